"""python scripts/parity_report.py HF_DIR OTHER_DIR [--device cuda] [--out parity_report] [--layer-by-layer]

How far this project's model, on the checkpoint OTHER_DIR, is from transformers' own, on the checkpoint HF_DIR it was
made from. Runs over the same chats (text, photo, clip, both, two photos, and a large one with four photos and a clip):

    reference   transformers, HF_DIR, fp32
    ours fp32   must vanish against bf16's noise
    hf bf16     transformers in bf16: the noise floor, what rounding alone does to the same model
    ours bf16   must not exceed it

Figures per run: relative error by norm, ||run - reference|| / ||reference||, of the vision features and of every
decoder layer's output; KL(reference || run) of the next-token distributions, in nats; share of tokens whose most likely
next token is the reference's; share of (token, layer) pairs that are routed to another set of experts.

Where two experts are nearly as likely, bf16 may route a token to the other one, and which tokens that happens to is
chance. So the bf16 runs are made twice: free, and with the reference's routes held ("held"), where their errors can be
compared to a few percent. The bounds are checked on the latter.

Works on any size: a checkpoint that does not fit into memory in fp32 is run layer by layer (see scripts/layerwise.py).
Exit status 0: within the bounds; 3: not. OUT/parity.png and OUT/parity.json are written either way.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from scripts.parity_runs import Batch, Record, fits, load, record
from scripts.sample_media import CASES, PHOTOS, Message, case_messages, chat_inputs, load_clip, load_photo, user

# fp32 differs from fp32 by the order of its sums only: 2^-16 of bf16's rounding, more where a near tie is routed the
# other way. A wrong weight or position shows as a multiple of bf16's error.
FP32_BOUND = 0.01
BF16_BOUND = 1.1


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


def report_chats() -> list[dict[str, list[Message]]]:
    """Two batches of chats by name: the CASES, padded; and one of several hundred tokens."""
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
    """By chat, and for all of them: logits_error, kl and kl_max, top1, flips."""
    pairs = zip(run.experts, reference.experts, strict=True)
    flipped = torch.stack([(a != b).any(-1) for a, b in pairs], dim=1).float()  # (rows, MoE layers)
    error, norm, kl, same = torch.cat(
        [torch.stack(compare_logits(a, b), 1) for a, b in zip(run.logits.split(64), reference.logits.split(64))]
    ).unbind(1)

    def figures(rows: slice) -> dict[str, float]:
        return {
            "logits_error": (error[rows].sum() / norm[rows].sum()).sqrt().item(),
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


def parity_report(
    hf_dir: Path, other_dir: Path, device: torch.device, layerwise: bool | None = None
) -> dict[str, Figures]:
    """The figures of the three runs against the reference, by the runs' names. `layerwise` None: as memory demands."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(hf_dir)
    tokens: dict[str, int] = {}
    batches: list[Batch] = []
    for chats in report_chats():
        batch = chat_inputs(processor, list(chats.values()))
        batches.append({name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)})
        tokens |= dict(zip(chats, batch["attention_mask"].sum(-1).tolist()))
    if layerwise is None:
        layerwise = not (fits(hf_dir, device) and fits(other_dir, device))

    def run(ours: bool, dtype: torch.dtype, routes: list[torch.Tensor] | None = None) -> Record:
        model = load(ours, other_dir if ours else hf_dir, dtype, device, layerwise)
        return record(model, batches, routes)

    reference = run(False, torch.float32)
    held = reference.experts
    runs: dict[str, tuple[Any, ...]] = {
        "ours fp32": (True, torch.float32),
        "hf bf16": (False, torch.bfloat16),
        "ours bf16": (True, torch.bfloat16),
        "hf bf16 held": (False, torch.bfloat16, held),
        "ours bf16 held": (True, torch.bfloat16, held),
    }
    return {name: compare(run(*arguments), reference, tokens) for name, arguments in runs.items()}


def verdicts(report: dict[str, Figures]) -> list[tuple[str, bool]]:
    """(what was checked, with its figures; whether it holds)."""
    floor = report["hf bf16 held"].cases["all"]["logits_error"]
    checks = []
    for name, bound in (("ours fp32", FP32_BOUND), ("ours bf16 held", BF16_BOUND)):
        ratio = report[name].cases["all"]["logits_error"] / floor
        text = f"{name}: the logits' error is {ratio:.3g} of transformers' in bf16, at most {bound}"
        checks.append((text, ratio <= bound))
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
        return f"{title:<24}" + "".join(f"{value:>16{style}}" for value in values)

    lines = [f"{'relative error':<24}" + "".join(f"{name:>16}" for name in names)]
    for i, part in enumerate(part_names(first)):
        lines.append(line(part, [[*report[name].vision, *report[name].layers][i] for name in names], ".2e"))
    titles = {
        "logits_error": ("logits, relative error", ".2e"),
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
    styles = ("o-", "s--", "x-", "s:", "x:")
    tiny = 1e-13  # where an exact zero is drawn on a logarithmic axis
    for number, (style, (name, figures)) in enumerate(zip(styles, report.items(), strict=True)):
        points = [*figures.vision, *figures.layers]
        depth.plot(range(len(points)), [max(value, tiny) for value in points], style, label=name, markersize=4)
        values = [max(case["kl"], tiny) for case in figures.cases.values()]
        kl.bar([x + 0.16 * (number - 2) for x in range(len(values))], values, width=0.15, label=name)
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
