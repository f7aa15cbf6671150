"""Finding the row that kills engines, with engines that die by a rule instead of for real."""

import pytest

from m3agiqa.suspects import Losses, Suspects


def run(suspects: Suspects, batches: list[list[str]], poison: set[str], deaths: int = 100) -> tuple[set, set, int]:
    """Scores batches one after the other as an actor does, each until its rows are out.

    Returns the rows that were scored, those that were found to be poison, and how many engines died.
    """
    scored, convicted, died = set(), set(), 0
    for ids in batches:
        while True:
            assert died <= deaths, "it does not come to an end"
            suspects.started("a")
            suspects.loaded("a")
            plan = suspects.plan(ids)
            convicted |= {ids[i] for i in plan.poison}
            for places in [plan.together, *plan.alone]:
                group, alone = [ids[i] for i in places], places is not plan.together
                suspects.enter("a", group, alone)
                if poison & set(group):
                    died += 1
                    break
                suspects.leave("a", group, alone)
                scored |= set(group)
            else:
                break
    return scored, convicted, died


@pytest.mark.parametrize("bad", [set(), {"r0"}, {"r15"}, {"r7", "r8"}, {"r3", "r12"}, {"r4", "r5", "r6"}])
def test_poison_is_found_and_every_other_row_is_scored(bad):
    batches = [[f"r{i}" for i in range(16)], [f"s{i}" for i in range(16)]]
    scored, convicted, died = run(Suspects(), batches, bad)
    assert convicted == bad
    assert scored == {name for batch in batches for name in batch} - bad
    # Twice in company, the halvings, and twice alone.
    assert died <= 2 + len(bad) * (4 + 2)


def test_one_row_in_a_batch_of_its_own():
    scored, convicted, died = run(Suspects(), [["only"]], {"only"})
    assert (scored, convicted, died) == (set(), {"only"}, 4)


def test_what_comes_out_is_cleared_so_that_lost_nodes_convict_nobody():
    suspects = Suspects()
    for _ in range(20):
        suspects.enter("a", ["x", "y"], False)
        suspects.started("a")
        suspects.enter("a", ["x", "y"], False)
        suspects.leave("a", ["x", "y"], False)
    assert suspects.plan(["x", "y"]).together == [0, 1]


def test_batches_beside_each_other_are_all_suspects_and_go_in_one_after_the_other():
    suspects = Suspects()
    for _ in range(2):
        suspects.enter("a", ["a", "b"], False)
        suspects.enter("a", ["c", "d"], False)
        suspects.started("a")
    for ids in (["a", "b"], ["c", "d"]):
        assert suspects.plan(ids).alone == [[0], [1]]
    # Another actor's rows are not touched by it.
    suspects.enter("b", ["e"], False)
    suspects.started("a")
    assert suspects.plan(["e"]).together == [0]


def start(suspects: Suspects) -> Losses:
    losses = suspects.started("a")
    suspects.loaded("a")
    return losses


def test_losses_count_until_a_row_comes_out():
    suspects = Suspects()
    assert start(suspects).count == 0
    for expected in (1, 2):
        suspects.enter("a", ["x"], False)
        assert start(suspects) == Losses(expected, loading=False)
    assert start(suspects).count == 2, "an empty engine was no loss"
    suspects.enter("a", ["y"], False)
    suspects.leave("a", ["y"], False)
    assert suspects.losses("a") == 0


def test_an_engine_that_dies_while_it_is_loaded_is_a_loss():
    suspects = Suspects()
    suspects.started("b")
    assert suspects.started("a") == Losses(0, loading=False)
    assert suspects.started("a") == Losses(1, loading=True)
    suspects.loaded("a")
    suspects.enter("a", ["x"], False)
    assert suspects.started("a") == Losses(2, loading=False)
    assert suspects.started("a") == Losses(3, loading=True)
    assert suspects.losses("b") == 0
