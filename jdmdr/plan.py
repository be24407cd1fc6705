"""Tells what a recipe will take before anything is spent: disk, memory, steps, hours, and the largest batch that fits.

    python -m jdmdr.plan --config configs/dmdr.py --config.data.root=DIR
    python -m jdmdr.plan --config configs/dmdr.py --hardware h100 --devices 8 --passages 106000000 --queries 40203

Sizes of the data are counted in --workdir, if its texts are tokenised, or else in the data root; these come first:

  --passages, --queries             how many, and how many train
  --passage_tokens, --query_tokens  means, special tokens included
  --hardware NAME                   h100, h200, v5e or v5p instead of what this machine has
  --devices N                       so many of it; without: one, or all of this machine's
  --mfu SHARE                       of the devices' peak that encoding and training reach; without: 0.35
  --shape NAME                      of an encoder that is not here: xlm-roberta-base, xlm-roberta-large, mbert, minilm
  --nocompile                       leaves out the memory of a step: a large encoder takes minutes to compile

Every figure says how it is known: counted, given, computed (by a formula over others), compiled (XLA's analysis of the
real step, by the compiler for TPUs where one is planned for and libtpu is installed; for other hardware that is not
here by the compiler for CPUs, which plans memory by its own rules), published or assumed.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import cli, progress
from jdmdr.types import UserError

if TYPE_CHECKING:
    import jax

    from jdmdr.costs import Cost
    from jdmdr.encoders import EncoderConfig
    from jdmdr.hardware import Device

MFU = 0.35
GRAD_CACHE = 32  # sequences at a time: what is tried where the recipe has no grad cache
SIZES = "passages", "passage_tokens", "queries", "query_tokens"


def show(config: ConfigDict, directory: pathlib.Path | None, values: flags.FlagValues) -> None:
    """Prints the plan."""
    given = {name: values[name].value for name in SIZES if values[name].value is not None}
    for name in (*SIZES, "mfu", "devices"):
        if values[name].value is not None and not values[name].value > 0:
            raise UserError(f"--{name} is {values[name].value}; it is above 0")
    mesh = _mesh(values.hardware, values.devices)

    from jdmdr import costs, fit, hardware, perf, sizes
    from jdmdr.check import check_config
    from jdmdr.objectives import BITEXT, blockwise
    from jdmdr.recipe import with_steps

    check_config(config)
    if config.train.objective.name == BITEXT:
        raise UserError(
            f"train.objective.name is {BITEXT}: it trains on pairs of translations, which are not planned for"
        )
    device, count = hardware.find(values.hardware), mesh.devices.size
    data = sizes.find_data(config, directory, given)
    on_cpu = not values.hardware and mesh.devices.flat[0].platform == "cpu"
    encoder, known = sizes.find_encoder(config, values.shape, "float32" if on_cpu else "bfloat16")
    parameters = sum(map(_count, fit.split_shapes(encoder, config.train, {})))
    sections = {
        name: with_steps(section, math.ceil(data.queries.value), 1 - section.cloze_share - section.pairs_share)
        for name, section in (("warmup", config.warmup), ("train", config.train))
    }
    forward = functools.partial(perf.forward_flops, encoder)
    trained = {name: _count(fit.split_shapes(encoder, section, {})[0]) for name, section in sections.items()}
    steps = {name: section.steps for name, section in sections.items()}
    stages = costs.stage_costs(config, data, encoder, parameters, trained, steps, forward)
    peak = device.flops or perf.matmul_peak(encoder.dtype)
    speed = peak * values.mfu * count
    lengths = tuple(config.train[f"{side}_length"] or config.encoder[f"{side}_length"] for side in ("query", "passage"))
    facts = [
        *((name.replace("_", " "), f"{figure.value:,.0f}", figure.how) for name, figure in data._asdict().items()),
        ("encoder", f"{encoder.kind}, {encoder.layers} layers, width {encoder.width}", known),
        ("parameters", f"{parameters:,}, of which {trained['train']:,} train", "computed"),
        (
            "hardware",
            f"{count} x {device.name}, {progress.size(device.memory)} each",
            "published" if device.flops else "this machine",
        ),
        ("its peak", f"{peak / 1e12:,.2f} TFLOP/s each", "published" if device.flops else "measured"),
        ("reached of it", f"{values.mfu:.0%}", "assumed" if values.mfu == MFU else "given"),
    ]
    print(tabulate(facts, ["", "", "known from"], disable_numparse=True), end="\n\n")
    print(stage_table(stages, speed), end="\n\n")
    if values.compile:
        whole = config.encoder.chunks == 1
        told = "Memory of a step: not compiled for passages in chunks."
        print(memory_table(encoder, sections["train"], lengths, device, mesh) if whole else told, end="\n\n")
    if count > 1 and device.bandwidth(count):
        of_query = forward(data.query_tokens.value) + config.train.passages_per_query * forward(
            data.passage_tokens.value
        )
        seconds = 3 * config.train.batch_size * of_query / speed
        sent = costs.sent_bytes(4 * trained["train"], *_sides(config.train), encoder.embedding_width, count,
                                in_blocks=blockwise.exceeds_one_block(*_sides(config.train), mesh))  # fmt: skip
        print(sending_table(sent, seconds, device.bandwidth(count)), end="\n\n")
    if encoder.kind == "static":
        print(
            "An encoder without layers computes next to nothing: its hours are those of reading and writing, and not planned."
        )
    print("Not in it: the searches of mine and evaluate, BM25, and a language model (python -m jdmdr.judge --dry_run).")
    print(f"Hardware: {device.source}.")


def stage_table(stages: Sequence[Cost], speed: float) -> str:
    """Disk, steps and hours of each stage at `speed` FLOP/s, and their sums."""
    rows = [[cost.stage, progress.size(cost.disk), cost.steps or "", hours(cost.flops / speed)] for cost in stages]
    disk, flops = (sum(getattr(cost, name) for cost in stages) for name in ("disk", "flops"))
    rows.append(["all", progress.size(disk), "", hours(flops / speed)])
    headers = ["stage (all computed)", "disk", "steps", "encoding, training"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right"))


def memory_table(
    encoder: EncoderConfig, section: ConfigDict, lengths: tuple[int, int], device: Device, mesh: jax.sharding.Mesh
) -> str:
    """Memory of a training step on each device, every text at its maximum, and the largest batches that fit."""
    from jdmdr import fit, objectives

    if section.objective.name in (*objectives.SEARCHING, *objectives.DISTILLING):
        return f"Memory of a step: not compiled for {section.objective.name}, whose step holds a collection or a teacher's vectors."
    devices = mesh.devices.size
    start = math.ceil(section.batch_size / devices) * devices

    def bytes_with(grad_cache: int) -> Callable[[int], int]:
        tried = section.copy_and_resolve_references()
        with tried.unlocked():
            tried.grad_cache = grad_cache

        @functools.cache
        def bytes_of(batch_size: int) -> int:
            progress.say(f"compiling a step of {batch_size} queries, grad_cache {grad_cache}")
            return fit.step_bytes(encoder, tried, lengths, batch_size, mesh)

        return bytes_of

    rows = []
    for grad_cache in dict.fromkeys((section.grad_cache, GRAD_CACHE)):
        bytes_of = bytes_with(grad_cache)
        largest, at_largest = fit.largest_batch(bytes_of, start, devices, device.memory)
        for batch_size, found in {start: bytes_of(start), largest: at_largest}.items():
            fits = "fits" if found <= device.memory else "does not fit"
            rows.append([batch_size or devices, grad_cache or "off", progress.size(found), fits])
        rows[-1][-1] += ", largest found" if largest else ""
    headers = [
        "train.batch_size",
        "train.grad_cache",
        f"memory of a device, compiled for a {mesh.devices.flat[0].platform.upper()}",
        f"of {progress.size(device.memory)}",
    ]
    return tabulate(rows, headers, disable_numparse=True, colalign=("right", "right", "right", "left"))


def sending_table(sent: dict[str, float], seconds: float, bandwidth: float) -> str:
    """What each device sends in a step of `seconds` of computing, one after the other."""
    rows = [[name, progress.size(number), f"{1e3 * number / bandwidth:,.2f} ms"] for name, number in sent.items()]
    waiting = sum(sent.values()) / bandwidth
    rows.append(["all", progress.size(sum(sent.values())), f"{1e3 * waiting:,.2f} ms"])
    rows.append(["computing", "", f"{1e3 * seconds:,.2f} ms"])
    rows.append(["efficiency, if nothing overlaps", "", f"{seconds / (seconds + waiting):.1%}"])
    headers = ["training step, each device (computed)", "sends", "time"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right"))


def hours(seconds: float) -> str:
    if not seconds:
        return ""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2g} s"


def _count(tree: Any) -> int:
    """Of the numbers in a tree of arrays."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _mesh(hardware: str, devices: int | None) -> jax.sharding.Mesh:
    """The devices to compile for: where there is no compiler for named hardware as many of the CPU's stand in."""
    import jax

    from jdmdr import parallel
    from jdmdr.hardware import tpu_mesh

    if hardware:
        jax.config.update("jax_platforms", "cpu")
    if slice_ := tpu_mesh(hardware, int(devices or 1)):
        return slice_
    if hardware or devices:
        jax.config.update("jax_num_cpu_devices", devices or 1)
    if devices and devices != jax.device_count():
        raise UserError(
            f"--devices is {devices}, but this machine has {jax.device_count()}; name others with --hardware"
        )
    return parallel.data_mesh()


def _sides(section: Any) -> tuple[int, int]:
    """Queries and passages of a batch."""
    return section.batch_size, section.batch_size * section.passages_per_query


if __name__ == "__main__":
    for name in SIZES:
        flags.DEFINE_float(name, None, "A size of the data.")
    flags.DEFINE_string("hardware", "", "Devices to plan for.")
    flags.DEFINE_integer("devices", None, "How many of them.")
    flags.DEFINE_float("mfu", MFU, "Share of their peak that is reached.")
    flags.DEFINE_string("shape", "", "The shape of an encoder that is not here.")
    flags.DEFINE_boolean("compile", True, "Compile the training step.")
    cli.run(show, __doc__, writes=False)
