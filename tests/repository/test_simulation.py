"""The simulation of the scheduler loop, held against what can be worked out with a pencil."""

from dataclasses import replace

import pytest

from benchmarks.scheduler_simulation import Scene, simulate

ROWS = 65_536
FREE = {"shard_ms": 0.0, "turn_ms": 0.0, "actor_ms": 0.0, "wait": 0.0}
AT_ONCE = {"wave_a_worker": 0, "loss": 0.0, "load": 0.0, "node_start": 0.0, "spread": 0.0}
PLAIN = Scene(documents=ROWS * 800, gpus=40, wave=10_000, **FREE, **AT_ONCE)


def finish(scene: Scene) -> float:
    return max(each.now for each in simulate(scene))


@pytest.mark.parametrize("slices", [1, 5])
def test_without_losses_and_with_a_free_driver_it_is_a_division(slices):
    """Shards over GPUs, rounded up, times the seconds of a shard; all of the GPUs' time is work."""
    scene = replace(PLAIN, slices=slices)
    (uses, *others) = [each.uses for each in simulate(scene)]

    assert finish(scene) == pytest.approx(800 / 40 * scene.seconds)
    assert uses["work"] == pytest.approx(sum(uses.values()))
    assert len(others) == slices - 1


def test_each_wave_costs_a_start_of_the_workers():
    """800 shards in waves of 160 on 40 GPUs: five waves of four shards a GPU, and a load before each."""
    scene = replace(PLAIN, wave=160, load=60.0)
    starts = scene.wave / 160 * 40 / 550  # the last worker of a wave is started so much later

    assert finish(scene) == pytest.approx(5 * (60 + 4 * scene.seconds + starts), abs=1)


def test_a_driver_with_more_to_do_than_time_is_the_bound():
    """With 1.5 times as many driver seconds a shard as the GPUs take, the run takes as long as the driver alone."""
    seconds = 1.5 * PLAIN.seconds / PLAIN.gpus
    (one,) = simulate(replace(PLAIN, shard_ms=seconds * 1e3))

    assert one.now == pytest.approx(800 * seconds, rel=0.05)
    assert one.uses["driver"] / sum(one.uses.values()) == pytest.approx(1 / 3, abs=0.05)
    assert finish(replace(PLAIN, shard_ms=seconds * 1e3, slices=2)) < 0.8 * one.now


@pytest.mark.parametrize("slices", [1, 4])
def test_every_shard_is_done_once_whatever_is_lost(slices):
    """With a node lost every other minute, in waves, each shard has one receipt; what was lost is work done again."""
    scene = Scene(documents=ROWS * 2000, gpus=64, wave=300, wave_a_worker=0, slices=slices, loss=4.0)
    runs = simulate(scene)

    assert [sorted(each.done) for each in runs] == [list(range(2000 // slices))] * slices
    assert sum(each.uses["thrown"] for each in runs) > 0
    assert sum(each.uses["work"] for each in runs) == pytest.approx(2000 * scene.seconds, rel=0.02)


def test_nodes_come_as_they_are_asked_for():
    """GPUs asked for ten at a time are all there after four starts of a node, not after one."""
    slow = replace(PLAIN, documents=ROWS * 8000, node_start=180.0, grow=10)

    assert finish(replace(slow, grow=0)) == pytest.approx(180 + 200 * slow.seconds)
    assert finish(slow) == pytest.approx(180 * 2.5 + 200 * slow.seconds, rel=0.02)
