import threading

import numpy as np
import pytest
import torch

from m3agiqa.errors import UserError
from m3agiqa.predictor.batches import batches, generator
from m3agiqa.predictor.metrics import agreement
from m3agiqa.predictor.train import Examples, fit
from m3agiqa.predictor.trainer import Labels, Trainer
from m3agiqa.train_config import TrainConfig
from tests.captured_sets import WIDTH, conversation

HEAD = {"width": 32, "blocks": 2, "hidden": 16}


def config(**sections):
    optim = {"learning_rate": 0.004, "epochs": 4, "batch_size": 16} | sections.pop("optim", {})
    return TrainConfig.model_validate({"head": HEAD, "optim": optim} | sections)


def examples(count, seed=0, aspects=1):
    rng = np.random.default_rng(seed)
    labels = rng.uniform(0.2, 4.8, count)
    outputs = torch.arange(count) % aspects
    states = [conversation(label, rng, int(o)) for label, o in zip(labels, outputs, strict=True)]
    return Examples(states, torch.tensor(labels), outputs)


def weights(fitted):
    return fitted.predictor.head.state_dict()


def test_it_learns_a_planted_signal_for_each_output():
    names = ("quality", "authenticity")
    told = []
    fitted = fit(examples(160, 0, 2), examples(40, 1, 2), config(), outputs=names, on_epoch=told.append)
    new = examples(60, 2, 2)
    found = fitted.predictor.predict_all(new.states)
    for i in range(2):
        mine = new.outputs == i
        assert agreement(found[mine, i], new.labels[mine])["srcc"] > 0.9
    assert told == fitted.history
    assert len(told) == 4
    best = max(fitted.history, key=lambda record: record["score"])
    assert fitted.best_epoch == best["epoch"]
    assert best["validation"]["quality"]["rmse"] < 0.7


@pytest.mark.parametrize("kind", ["fidelity", "ranknet", "margin"])
def test_ranking_alone_gives_the_order(kind):
    loss = {"mse": 0, "plcc": 0, "rank": 1, "rank_kind": kind}
    fitted = fit(examples(96), examples(40, 1), config(loss=loss, optim={"epochs": 3, "metric": "srcc"}))
    assert fitted.history[fitted.best_epoch - 1]["validation"]["quality"]["srcc"] > 0.9


def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state():
    shape = {"head": HEAD | {"dropout": 0.1}, "optim": {"epochs": 2}}
    before = torch.get_rng_state()
    first, second = (fit(examples(48), examples(20, 1), config(**shape)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))
    other = fit(examples(48), examples(20, 1), config(**shape | {"optim": {"epochs": 2, "seed": 1}}))
    assert not torch.equal(weights(first)["input.weight"], weights(other)["input.weight"])


class Half:
    """One of two threads that play processes."""

    def __init__(self, rank, board, barrier):
        self.rank, self.size, self._board, self._barrier = rank, 2, board, barrier

    def gather_objects(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        found = [self._board[0], self._board[1]]
        self._barrier.wait()
        return found

    def gather(self, values):
        return torch.cat(self.gather_objects(values))

    def add(self, tensors):
        tensors = list(tensors)
        both = self.gather_objects([one.clone() for one in tensors])
        for one, first, second in zip(tensors, *both, strict=True):
            one.copy_(first + second)


class Fixed:
    """Batches that are given."""

    def __init__(self, found, judged):
        self.steps, self._found, self._judged = max(len(found), 3), found, judged

    def train(self, epoch):
        return iter(self._found)

    def validation(self):
        return iter(self._judged)


def test_two_processes_take_the_steps_of_one():
    train, judged = examples(40, 0, 2), examples(20, 1, 2)
    settings = config(loss={"plcc": 1, "rank": 1}, optim={"epochs": 2, "batch_size": 16})
    labels, other = Labels(train.labels, train.outputs), Labels(judged.labels, judged.outputs)

    def share(part, size, rows):
        taken = [(i, part.states[i]) for i in rows]
        return list(batches(taken, size, window=size))

    def trainer(group=None):
        found = Trainer(settings, WIDTH, ("a", "b"), (0, 5), labels, other, group=group)
        # What Adam makes of a slope of nearly nothing is its rounding.
        found.head.double()
        return found

    alone = trainer()
    alone.run(Fixed(share(train, 16, range(40)), share(judged, 16, range(20))))
    board, barrier = [None, None], threading.Barrier(2, timeout=60)
    pair = [trainer(Half(rank, board, barrier)) for rank in range(2)]
    # Steps of 16, 16 and 8: the first process has 8, 8 and 8, the second 8, 8 and none.
    rows = ([*range(8), *range(16, 24), *range(32, 40)], [*range(8, 16), *range(24, 32)])
    held = (range(15), range(15, 20))
    sources = [Fixed(share(train, 8, rows[i]), share(judged, 8, held[i])) for i in range(2)]
    threads = [threading.Thread(target=one.run, args=(s,)) for one, s in zip(pair, sources, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, value in alone.head.state_dict().items():
        first, second = (one.head.state_dict()[name] for one in pair)
        assert torch.equal(first, second)
        assert torch.allclose(first, value, atol=1e-6), name
    assert pair[0].progress.history[1]["loss"] == pytest.approx(alone.progress.history[1]["loss"], rel=1e-3)


def test_it_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    train, judged = examples(48), examples(20, 1)
    labels, other = (Labels(part.labels, part.outputs) for part in (train, judged))
    settings = config(head=HEAD | {"dropout": 0.2}, optim={"epochs": 3})

    class Source(Fixed):
        def train(self, epoch):
            order = generator(epoch)
            return batches(enumerate(train.states), 16, window=48, bucket=2, generator=order)

    def source():
        return Source([], list(batches(enumerate(judged.states), 16, window=20)))

    def trainer():
        return Trainer(settings, WIDTH, ("quality",), (0, 5), labels, other)

    class Stop(Exception):
        pass

    whole, begun, gone_on = trainer(), trainer(), trainer()
    whole.run(source())

    def stop():
        begun.save(tmp_path)
        raise Stop

    with pytest.raises(Stop):
        begun.run(source(), stop)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors", ".safetensors"]
    torch.rand(100)
    gone_on.load(tmp_path)
    assert gone_on.progress.epoch == 1
    gone_on.run(source())
    for name, value in whole.head.state_dict().items():
        assert torch.equal(gone_on.head.state_dict()[name], value), name
    assert gone_on.progress.best_epoch == whole.progress.best_epoch


def test_it_stops_when_nothing_gets_better():
    settings = config(optim={"epochs": 30, "patience": 2, "learning_rate": 1e-12})
    assert len(fit(examples(32), examples(16, 1), settings).history) < 8


def test_the_rate_rises_and_falls():
    settings = config(optim={"epochs": 6, "warmup": 4, "cosine": True, "patience": 9})
    rates = [record["learning_rate"] for record in fit(examples(32), examples(16, 1), settings).history]
    assert rates[0] == pytest.approx(0.002)
    assert max(rates) <= 0.004
    assert rates[-1] < 0.0005


def test_batches_hold_everything_once_and_pad_little():
    lengths = torch.randint(1, 200, (100,), generator=generator(0)).tolist()
    made = [(i, torch.zeros(n, 2)) for i, n in enumerate(lengths)]

    def padded(bucket):
        found = list(batches(iter(made), 8, window=60, bucket=bucket, generator=generator(1)))
        assert sorted(torch.cat([batch.rows for batch in found]).tolist()) == list(range(100))
        assert max(len(batch.rows) for batch in found) == 8
        for batch in found:
            assert batch.lengths.tolist() == [lengths[i] for i in batch.rows.tolist()]
        return sum(batch.states.shape[0] * batch.states.shape[1] for batch in found) / sum(lengths)

    assert padded(8) < 1.25 < padded(1)


def test_what_cannot_be_trained_is_refused():
    good = examples(16)
    with pytest.raises(UserError, match="all of them equal"):
        fit(Examples(good.states, torch.full((16,), 3.0)), good, config())
    with pytest.raises(UserError, match=r"not finite in epoch 1.*lower it"):
        fit(Examples([torch.full_like(one, torch.inf) for one in good.states], good.labels), good, config())
    with pytest.raises(ValueError, match=r"16 states, but labels \[3\]"):
        fit(Examples(good.states, torch.zeros(3)), good, config())
