"""The GPU benchmark's figures as one Markdown page."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]


def to_markdown(figures: Figures) -> str:
    ceilings = figures["ceilings"]
    lines = [
        "# On a GPU",
        "",
        f"Measured {figures['date']} on {figures['card']}, torch {figures['torch']}, by "
        f"`python -m benchmarks.gpu{figures['arguments']}` in {figures['seconds']:.0f} s. Random "
        "weights at the named widths, bfloat16. Milliseconds are medians of alternating rounds.",
        "",
        f"Ceilings measured in the same run: {ceilings['read_gb_per_s']:.0f} GB/s read, "
        f"{ceilings['copy_gb_per_s']:.0f} GB/s copied (read and written), "
        f"{ceilings['matmul_tflops']:.1f} TFLOP/s bf16. A floor is the larger of the bytes a step "
        "must read and the operations it must do over these; a share is the floor over the time. "
        "Expert workers share the card with the shard and with each other, in turns, so over gRPC "
        "nothing runs side by side that would on cards of their own.",
    ]
    for model in figures["models"]:
        lines += ["", *_model(model)]
    for kernels in figures["kernels"]:
        lines += ["", *_kernel_tables(kernels)]
    if figures["skipped"]:
        lines += ["", "## Left out", "", *(f"- {what}" for what in figures["skipped"])]
    return "\n".join(lines) + "\n"


def _model(model: Figures) -> list[str]:
    sides = model["sides"]
    lines = [f"## {model['shape']}, {model['num_layers']} layers", ""]
    lines += [f"- {name}: {_agreement(values)}" for name, values in model["agreement"].items()]
    header = ["workload", "experts read", "floor ms", *(f"{s}: ms (share)" for s in sides)]
    has_grpc = "over gRPC" in sides
    header += ["gRPC / in process"] if has_grpc else []
    rows = []
    for work in model["workloads"]:
        unit = "sequences" if work["kind"] == "decode" else "tokens"
        row = [f"{work['kind']} {work['size']} {unit}", str(work["active_experts"])]
        row += [f"{work['floor_ms']:.2f}", *(_side(work["sides"].get(side)) for side in sides)]
        rows.append(row + ([_ratio(work["sides"])] if has_grpc else []))
    lines += ["", *_table(header, rows)]
    split = [work for work in model["workloads"] if work["over_grpc_ms"]]
    if split:
        names = list(split[0]["over_grpc_ms"])
        lines += ["", "Where a step over gRPC goes, ms:", ""]
        lines += _table(
            ["workload", *names],
            [
                [f"{work['kind']} {work['size']}"]
                + [f"{work['over_grpc_ms'][name]:.2f}" for name in names]
                for work in split
            ],
        )
    return lines


def _kernel_tables(kernels: Figures) -> list[str]:
    lines = [f"## Kernels at the widths of {kernels['shape']}"]
    lines += ["", "One expert's FFN, microseconds (share of its floor) by rows:", ""]
    lines += _kernels(kernels["experts"])
    lines += ["", "All experts of a layer over one frame, microseconds by tokens:", ""]
    lines += _kernels(kernels["layers"])
    lines += ["", "Rows of hidden states between device and host, microseconds:", ""]
    copies = kernels["copies"]
    lines += _table(list(copies[0]), [[str(value) for value in row.values()] for row in copies])
    return lines


def _kernels(rows: list[Figures]) -> list[str]:
    counts = [key.removeprefix("us_") for key in max(rows, key=len, default={}) if "us_" in key]
    table = []
    for row in rows:
        if "failed" in row:
            table.append([row["kernel"], *([""] * len(counts)), row["failed"]])
            continue
        cells = []
        for count in counts:
            share = row.get(f"floor_share_{count}")
            cells.append(f"{row[f'us_{count}']}" + (f" ({share:.2f})" if share is not None else ""))
        table.append([row["kernel"], *cells, str(row.get("error", ""))])
    return _table(["kernel", *counts, "relative error"], table)


def _agreement(values: Figures) -> str:
    return (
        f"logits of one step differ from those in process by {values['relative_error']:.5f} "
        f"(relative norm), {values['same_tokens']:.0%} of tokens are the same"
    )


def _side(values: Figures | None) -> str:
    return f"{values['ms']:.2f} ({values['floor_share']:.2f})" if values else "-"


def _ratio(sides: Figures) -> str:
    if "over gRPC" not in sides or "in process" not in sides:
        return "-"
    return f"{sides['in process']['ms'] / sides['over gRPC']['ms']:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
