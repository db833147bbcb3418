"""Workers that do whole shards, on nodes that are lost or not needed any more."""

from tests.support.stages import run_apart


def test_idle_workers_of_a_lost_node_cost_a_shard_no_death(tmp_path):
    """A shard on a node that is lost with idle workers is done on a new one."""
    assert sorted(run_apart("idle_beside", tmp_path)["done"]) == list(range(4))


def test_no_second_node_is_kept_for_a_stage_of_one_shard(tmp_path):
    """So that an autoscaler may take it back."""
    assert run_apart("one_after_many", tmp_path)["free"] == 4.0


def test_a_lost_node_costs_shards_nothing_but_time(tmp_path):
    """Shards of a lost node are done on the other, before a new one comes."""
    result = run_apart("two_nodes", tmp_path)

    assert sorted(result["done"]) == list(range(30))
    assert result["pids"] == 2
