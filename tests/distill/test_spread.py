"""Two processes: gradients averaged by hand, and those of sharded units of blocks, against DDP's."""

import multiprocessing

import pytest
import spread_run
import torch

from cgspn.distill import ComputeConfig

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["cgspn.distill", "cgspn.teachers", "cgspn.data"])


def of_two(folder, name, **settings):
    """What a function of spread_run returns in the first of two processes."""
    running = [fork.Process(target=spread_run.enter, args=(rank, 2, str(folder), name, settings)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in running] == [0, 0]
    return torch.load(folder / "result.pt")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_units_have_blocks():
    with pytest.raises(ValueError, match="blocks_per_unit is 0"):
        ComputeConfig(blocks_per_unit=0)


@pytest.mark.slow
@pytest.mark.parametrize("output", [1.0, 0.0])
def test_gradients_averaged_by_hand_are_those_of_ddp(tmp_path, output):
    """With parts, and with parameters that get no gradient."""
    ours, theirs = of_two(tmp_path, "by_hand_and_by_ddp", output=output)
    same(ours, theirs)
    assert any(gradient is None for gradient in ours.values()) == (output == 0)


CASES = [(blocks, reshard, kept) for blocks in (1, 2, 9) for reshard in (True, False) for kept in (True, False)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Every case in one pair of processes."""
    return of_two(tmp_path_factory.mktemp("sharded"), "all_sharded", cases=CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_unit_of_blocks_is_gathered_once_a_pass(sharded, case):
    blocks, reshard, _ = case
    theirs, found = sharded
    ours, (gathers, reductions) = found[case]
    same(ours, theirs)
    units = -(-spread_run.DEPTH // blocks)
    assert gathers == units * (2 if reshard else 1)
    assert reductions == units


@pytest.mark.slow
def test_a_snapshot_of_shards_is_loaded_into_shards(tmp_path):
    before, after = of_two(tmp_path, "snapshot_of_shards", at=str(tmp_path / "s"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert sorted(path.name for path in (tmp_path / "s/00000001").iterdir()) == [
        *("0.safetensors", "1.safetensors", "manifest.json", "record.json")
    ]
