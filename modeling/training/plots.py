"""Pictures of a run from its `metrics.jsonl` and `router.jsonl`: loss, load of the experts, throughput."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _column(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, drawn without a screen and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_loss(lines: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = _figure(11, 4, columns=2)
    left.plot(*_column(lines, "loss"), color="C0", linewidth=1.2)
    left.set(xlabel="step", ylabel="loss per token (nats)", yscale="log", title="loss")
    right.plot(*_column(lines, "grad_norm"), color="C1", linewidth=0.9, label="gradient norm")
    right.set(xlabel="step", yscale="log", title="gradient norm and learning rate")
    rates = right.twinx()
    rates.plot(*_column(lines, "lr"), color="C2", linewidth=1.2, label="learning rate")
    rates.set_ylabel("learning rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(handles=[*right.lines, *rates.lines], loc="upper right")
    figure.savefig(path, dpi=120)


def draw_router(lines: list[dict[str, Any]], path: Path) -> None:
    """Left: each expert's load at the last statistics; right: the busiest expert's over the course of the run."""
    if not lines:
        return
    last = lines[-1]
    figure, (left, right) = _figure(13, 4.5, columns=2)
    experts = len(last["load"][0])
    relative = [[share * experts for share in layer] for layer in last["load"]]
    image = left.imshow(relative, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    left.set(xlabel="expert", ylabel="decoder layer", title=f"load of the experts at step {last['step']} (1 is even)")
    left.set_yticks(range(len(last["layers"])), last["layers"])
    figure.colorbar(image, ax=left)
    for i, layer in enumerate(last["layers"]):
        values = [line["max_violation"][i] for line in lines]
        right.plot([line["step"] for line in lines], values, linewidth=1, label=f"layer {layer}")
    right.set(xlabel="step", ylabel="busiest expert's load / mean - 1", title="max violation")
    right.grid(alpha=0.3)
    if len(last["layers"]) <= 12:
        right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_throughput(lines: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = _figure(11, 4, columns=2)
    left.plot(*_column(lines, "tokens_per_second"), color="C0", linewidth=0.9)
    left.set(xlabel="step", ylabel="tokens / s, all ranks", title="throughput", ylim=(0, None))
    steps, mfu = _column(lines, "mfu")
    if steps:
        right.plot(steps, [100 * value for value in mfu], color="C1", linewidth=0.9)
        right.set(xlabel="step", ylabel="%", title="model FLOPs utilisation", ylim=(0, None))
    else:
        right.plot(*_column(lines, "tflops"), color="C1", linewidth=0.9)
        right.set(xlabel="step", ylabel="TFLOP/s a device", title="model FLOPs", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_plots(folder: Path) -> list[Path]:
    """Draw `loss.png`, `experts.png` and `throughput.png` into the run's folder."""
    metrics, router = read_lines(folder / "metrics.jsonl"), read_lines(folder / "router.jsonl")
    if not metrics:
        return []
    draw_loss(metrics, folder / "loss.png")
    draw_throughput(metrics, folder / "throughput.png")
    draw_router(router, folder / "experts.png")
    return [path for path in (folder / name for name in ("loss.png", "throughput.png", "experts.png")) if path.exists()]
