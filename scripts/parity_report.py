"""python scripts/parity_report.py HF_DIR OTHER_DIR [--device cuda] [--out parity_report] [--layer-by-layer]

How far this project's model, on the checkpoint OTHER_DIR, is from transformers' own, on the checkpoint HF_DIR it was
made from. Four runs over the same batch of chats (text, photo, clip, both, two photos, a large one):

    reference           transformers, HF_DIR, fp32
    transformers bf16   the noise floor: what rounding alone does to the same model
    ours fp32           must vanish against that floor
    ours bf16           must not exceed it

Figures per run: relative error by norm, ||run - reference|| / ||reference||, of the vision features and of every
decoder layer's output; KL(reference || run) of the next-token distributions, in nats; share of tokens whose most likely
next token is the reference's; share of (token, layer) pairs that are routed to another set of experts.

Works on any size: a checkpoint that does not fit into memory in fp32 is run layer by layer (see scripts/layerwise.py).
Exit status 0: within the bounds; 3: not. OUT/parity.png and OUT/parity.json are written either way.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from conversion.checkpoint import open_checkpoint
from scripts.layerwise import build_layerwise, read_any_layout, read_by_shape
from scripts.sample_media import CASES, PHOTOS, Message, case_messages, chat_inputs, load_clip, load_photo, user

# fp32 differs from fp32 only by the order of its sums: 2^-16 of bf16's rounding, more where a near tie is routed the
# other way. A wrong weight or position shows as a multiple of the floor.
FP32_BOUND = 0.01
BF16_BOUND = 1.1


@dataclass
class Record:
    """What one run leaves behind, on the CPU in fp32; rows are the real tokens of all chats, in order."""

    vision: list[torch.Tensor]  # features (M, H) of each deepstack layer, then of the merger
    layers: list[torch.Tensor]  # each decoder layer's output (rows, H)
    experts: list[torch.Tensor]  # sorted chosen experts (rows, K) of each MoE layer
    logits: torch.Tensor  # (rows, V)


@dataclass
class Figures:
    """One run against the reference. `cases` holds the figures of `compare_heads` for each chat and for all."""

    vision: list[float]
    layers: list[float]
    cases: dict[str, dict[str, float]]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||, summed in fp64."""
    difference = (value.double() - reference.double()).norm()
    return (difference / reference.double().norm()).item()


def record(model: Any, batches: list[dict[str, torch.Tensor]]) -> Record:
    """One forward per batch of either implementation, in eval mode, watched through hooks on modules that both have."""
    parts: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    real_tokens = torch.empty(0)  # of the batch that is running
    top_k, dtype = model.config.text_config.num_experts_per_tok, model.dtype
    hooks = []

    def keep_rows(output: Any) -> torch.Tensor:
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden.detach().flatten(0, -2)[real_tokens].float().cpu()

    def watch(module: nn.Module, kind: str, number: int, read: Callable[[Any], torch.Tensor]) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            parts[kind, number].append(read(output))

        hooks.append(module.register_forward_hook(hook))

    visual, text = model.model.visual, model.model.language_model
    for i, merger in enumerate([*visual.deepstack_merger_list, visual.merger]):
        watch(merger, "vision", i, lambda output: output.detach().float().cpu())
    for i, layer in enumerate(text.layers):
        watch(layer, "layers", i, keep_rows)
        if hasattr(layer.mlp, "gate"):
            watch(layer.mlp.gate, "experts", i, lambda output: keep_rows(output).topk(top_k).indices.sort(-1).values)
    watch(model.lm_head, "logits", 0, keep_rows)
    for batch in batches:
        real_tokens = batch["attention_mask"].flatten().bool()
        with torch.no_grad():
            model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    for hook in hooks:
        hook.remove()

    def joined(kind: str) -> list[torch.Tensor]:
        return [torch.cat(tensors) for (name, _), tensors in sorted(parts.items()) if name == kind]

    return Record(joined("vision"), joined("layers"), joined("experts"), joined("logits")[0])


def report_chats() -> list[dict[str, list[Message]]]:
    """Two batches of chats by name: the CASES, padded; and one of several hundred tokens, so that a rounding which
    happens to flip a route, or not to, weighs little."""
    photos = [load_photo(name, max_side=None) for name in PHOTOS]
    large = user(*photos, load_clip(num_frames=8, seconds=10.0, max_side=None), "Describe all of these.")
    return [{name: case_messages(name) for name in CASES}, {"large": [large]}]


def compare(run: Record, reference: Record, tokens: dict[str, int]) -> Figures:
    """Figures of a run; `tokens` says how many rows each chat has, in the rows' order."""
    return Figures(
        vision=[relative_error(a, b) for a, b in zip(run.vision, reference.vision, strict=True)],
        layers=[relative_error(a, b) for a, b in zip(run.layers, reference.layers, strict=True)],
        cases=compare_heads(run, reference, tokens),
    )


def compare_heads(run: Record, reference: Record, tokens: dict[str, int]) -> dict[str, dict[str, float]]:
    """By chat, and for all of them: logits_error, its part logits_error_kept on tokens that every layer routed as the
    reference did, kl and kl_max, top1, flips."""
    pairs = zip(run.experts, reference.experts, strict=True)
    flipped = torch.stack([(a != b).any(-1) for a, b in pairs], dim=1).float()  # (rows, MoE layers)
    error, norm, kl, same = torch.cat(
        [torch.stack(compare_logits(a, b), 1) for a, b in zip(run.logits.split(64), reference.logits.split(64))]
    ).unbind(1)

    def figures(rows: slice) -> dict[str, float]:
        kept = flipped[rows].sum(-1) == 0
        return {
            "logits_error": (error[rows].sum() / norm[rows].sum()).sqrt().item(),
            "logits_error_kept": (error[rows][kept].sum() / norm[rows][kept].sum()).sqrt().item(),
            "kl": kl[rows].mean().item(),
            "kl_max": kl[rows].max().item(),
            "top1": same[rows].mean().item(),
            "flips": flipped[rows].mean().item(),
        }

    ends = list(accumulate(tokens.values()))
    cases = {name: figures(slice(end - count, end)) for (name, count), end in zip(tokens.items(), ends)}
    return cases | {"all": figures(slice(0, ends[-1]))}


def compare_logits(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(rows, V) twice -> per row, fp64: squared error, squared norm of theirs, KL(theirs || ours), same top token."""
    ours, theirs = ours.double(), theirs.double()
    difference = theirs - ours
    log_sum = theirs.logsumexp(-1, keepdim=True)
    shift = log_sum - ours.logsumexp(-1, keepdim=True)
    kl = ((theirs - log_sum).exp() * (difference - shift)).sum(-1).clamp_min(0)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    return difference.square().sum(-1), theirs.square().sum(-1), kl, same


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo names no MemAvailable: pass --layer-by-layer")


def fits(folder: Path, device: torch.device) -> bool:
    """Whether the checkpoint in fp32, and a fifth on top, fits into the device's free memory."""
    elements = sum(math.prod(location.info.shape) for location in open_checkpoint(folder).stored.values())
    return 1.2 * 4 * elements < free_memory(device)


def load(ours: bool, folder: Path, dtype: torch.dtype, device: torch.device, layerwise: bool) -> Any:
    """The model in eval mode: by its own `from_pretrained`, or layer by layer."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM

    model_class = Qwen3VLMoeForCausalLM if ours else Qwen3VLMoeForConditionalGeneration
    if ours and open_checkpoint(folder).layout.layout not in ("hub", "fused"):
        layerwise = True  # from_pretrained reads those two
    if not layerwise:
        return model_class.from_pretrained(folder, dtype=dtype).to(device).eval()
    config = model_class.config_class.from_pretrained(folder)
    read = read_any_layout(folder) if ours else read_by_shape(folder)
    return build_layerwise(model_class, config, read, dtype, device)


def parity_report(
    hf_dir: Path, other_dir: Path, device: torch.device, layerwise: bool | None = None
) -> dict[str, Figures]:
    """The figures of the three runs against the reference, by the runs' names. `layerwise` None: as memory demands."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(hf_dir)
    tokens: dict[str, int] = {}
    batches = []
    for chats in report_chats():
        batch = chat_inputs(processor, list(chats.values()))
        batches.append({name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)})
        tokens |= dict(zip(chats, batch["attention_mask"].sum(-1).tolist()))
    if layerwise is None:
        layerwise = not (fits(hf_dir, device) and fits(other_dir, device))

    def run(ours: bool, dtype: torch.dtype) -> Record:
        return record(load(ours, other_dir if ours else hf_dir, dtype, device, layerwise), batches)

    reference = run(False, torch.float32)
    runs = {
        "ours fp32": (True, torch.float32),
        "transformers bf16": (False, torch.bfloat16),
        "ours bf16": (True, torch.bfloat16),
    }
    return {name: compare(run(*arguments), reference, tokens) for name, arguments in runs.items()}


def verdicts(report: dict[str, Figures]) -> list[tuple[str, bool]]:
    """(what was checked, with its figures; whether it holds)."""
    ours32, floor, ours16 = (report[name] for name in ("ours fp32", "transformers bf16", "ours bf16"))
    checks = []
    for run, bound in ((ours32, FP32_BOUND), (ours16, BF16_BOUND)):
        name = "ours fp32" if run is ours32 else "ours bf16"
        ratio = run.cases["all"]["logits_error"] / floor.cases["all"]["logits_error"]
        checks.append((f"{name}: logits error is {ratio:.3g} of the bf16 noise floor, at most {bound}", ratio <= bound))
    return checks


def part_names(figures: Figures) -> list[str]:
    """Names of the places where an error is measured, from the pixels to the last decoder layer."""
    deepstack = [f"vision deepstack {i}" for i in range(len(figures.vision) - 1)]
    return [*deepstack, "vision merger", *(f"decoder layer {i}" for i in range(len(figures.layers)))]


def format_report(report: dict[str, Figures], chats: tuple[str, ...] | None = None) -> str:
    """The figures as plain-text tables, of the named `chats` only (None: of each, and of all together)."""
    names = list(report)
    first = report[names[0]]
    chats = tuple(first.cases) if chats is None else chats

    def line(title: str, values: list[float], style: str) -> str:
        return f"{title:<24}" + "".join(f"{value:>20{style}}" for value in values)

    lines = [f"{'relative error':<24}" + "".join(f"{name:>20}" for name in names)]
    for i, part in enumerate(part_names(first)):
        lines.append(line(part, [[*report[name].vision, *report[name].layers][i] for name in names], ".2e"))
    titles = {
        "logits_error": ("logits, relative error", ".2e"),
        "logits_error_kept": ("logits, tokens with unchanged routes", ".2e"),
        "kl": ("KL in nats, mean", ".2e"),
        "kl_max": ("KL in nats, largest", ".2e"),
        "top1": ("top-1 agreement", ".2%"),
        "flips": ("routing flips", ".2%"),
    }
    for key, (title, style) in titles.items():
        lines += ["", title]
        lines += [line("  " + case, [report[name].cases[case][key] for name in names], style) for case in chats]
    lines.append("")
    lines += [f"{'ok    ' if holds else 'FAILED'}  {text}" for text, holds in verdicts(report)]
    return "\n".join(lines)


def draw(report: dict[str, Figures], path: Path) -> None:
    """The picture: error along the depth of the model, and KL by chat, a colour for each run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (depth, kl) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained")
    styles = {"ours fp32": "o-", "transformers bf16": "s--", "ours bf16": "x-"}
    tiny = 1e-13  # where an exact zero is drawn on a logarithmic axis
    for number, (name, figures) in enumerate(report.items()):
        points = [*figures.vision, *figures.layers]
        depth.plot(range(len(points)), [max(value, tiny) for value in points], styles[name], label=name, markersize=4)
        values = [max(case["kl"], tiny) for case in figures.cases.values()]
        kl.bar([x + 0.27 * (number - 1) for x in range(len(values))], values, width=0.25, label=name)
    first = next(iter(report.values()))
    labels = part_names(first)
    step = max(1, len(labels) // 16)
    depth.set_xticks(range(0, len(labels), step), labels[::step], rotation=45, ha="right", fontsize=8)
    depth.set(yscale="log", ylabel="relative error by norm", title="Outputs against transformers in fp32")
    kl.set_xticks(range(len(first.cases)), list(first.cases), rotation=45, ha="right", fontsize=8)
    kl.set(yscale="log", ylabel="KL(reference || run), nats", title="Next-token distributions")
    for axes in (depth, kl):
        axes.grid(axis="y", alpha=0.3)
    depth.legend(fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(report: dict[str, Figures], out: Path, facts: dict[str, Any]) -> None:
    """OUT/parity.json, the figures with the `facts` they were measured under, and OUT/parity.png."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        **facts,
        "runs": {name: asdict(figures) for name, figures in report.items()},
        "checks": [{"check": text, "holds": holds} for text, holds in verdicts(report)],
    }
    (out / "parity.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw(report, out / "parity.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="checkpoint that transformers loads")
    parser.add_argument("other_dir", type=Path, metavar="OTHER_DIR", help="checkpoint of any layout, for this model")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=Path("parity_report"), help="folder for parity.png and parity.json")
    parser.add_argument("--layer-by-layer", action="store_true", help="also where the model fits into memory")
    args = parser.parse_args(argv)
    import transformers

    torch.backends.cudnn.allow_tf32 = False  # else transformers' Conv3d rounds fp32 to 10 bits on a GPU
    report = parity_report(args.hf_dir, args.other_dir, args.device, True if args.layer_by_layer else None)
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(args.device)}
    print(format_report(report))
    write_report(report, args.out, {"hf_dir": str(args.hf_dir), "other_dir": str(args.other_dir), **facts})
    print(f"\n{args.out / 'parity.png'} and {args.out / 'parity.json'} written")
    return 0 if all(holds for _, holds in verdicts(report)) else 3


if __name__ == "__main__":
    sys.exit(main())
