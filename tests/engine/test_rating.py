import math

import pytest

from m3agiqa.engine.rating import prefixes, rating_probs


def test_single_token_words_need_one_look_and_give_their_softmax():
    ids = [(10,), (11,), (12,), (13,), (14,)]
    assert prefixes(ids) == {(): (10, 11, 12, 13, 14)}
    logits = [0.0, 1.0, 2.0, 3.0, -1.0]
    probs = rating_probs(ids, {(): dict(zip(range(10, 15), [x - 7.0 for x in logits], strict=True))})
    total = sum(math.exp(x) for x in logits)
    assert probs == pytest.approx([math.exp(x) / total for x in logits])


def test_words_of_several_tokens_multiply_along_the_tree():
    ids = [(1,), (2, 3), (2, 4, 5), (6,), (7, 3)]
    needed = prefixes(ids)
    assert needed == {(): (1, 2, 6, 7), (2,): (3, 4), (7,): (3,), (2, 4): (5,)}
    assert next(iter(needed)) == ()
    p = {(): {1: 0.1, 2: 0.4, 6: 0.2, 7: 0.1}, (2,): {3: 0.5, 4: 0.25}, (2, 4): {5: 0.8}, (7,): {3: 1.0}}
    found = rating_probs(ids, {k: {t: math.log(v) for t, v in row.items()} for k, row in p.items()})
    joint = [0.1, 0.2, 0.08, 0.2, 0.1]
    assert found == pytest.approx([j / sum(joint) for j in joint])


def test_no_possible_word_gives_no_probabilities():
    ids = [(i,) for i in range(5)]
    assert rating_probs(ids, {(): dict.fromkeys(range(5), -math.inf)}) is None
