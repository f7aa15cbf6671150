"""A small causal language model, trained from scratch on conversations: it stands for the MLLM of the full system.

It sees text alone: [question with the image's prompt, description, question 2], and learns to go on with them
and to give the rating word at their end. Its last hidden states are what a predictor is trained on.

What a corpus of 2,000 short conversations asks for: token embeddings that begin as those of the words'
neighbours (a factored PPMI matrix, Levy and Goldberg, NIPS 2014), one layer, hidden words, averaged weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from m3agiqa.aspects import RATING_LEVELS, RATING_WORDS, SCALE_MAX

PAD, UNKNOWN, HIDDEN = "<pad>", "<unk>", "<hidden>"
_RATINGS = tuple(f"<{word}>" for word in RATING_WORDS)
_WINDOW = 4
_CAPTURED_AT_ONCE = 64


@dataclass(frozen=True)
class Recipe:
    """How the language model is made; all of it was chosen on validation parts.

    Attributes:
        members: networks that are trained apart, from other first weights; their states stand side by side.
        vocabulary: of the byte-pair tokens. spread: standard deviation of the first embeddings.
        hidden: share of the tokens that it does not see. learnt: share of the next tokens that give a loss.
        blur: standard deviation, on the scale of the scores, that spreads a score over the rating words.
    """

    members: int = 1
    vocabulary: int = 2500
    width: int = 192
    layers: int = 1
    heads: int = 4
    dropout: float = 0.1
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 60
    average: float = 0.99
    spread: float = 0.05
    hidden: float = 0.2
    learnt: float = 0.3
    blur: float = 0.4


@dataclass(frozen=True)
class LanguageModel:
    """Trained networks and their tokenizer."""

    tokenizer: Tokenizer
    networks: tuple[GPT2LMHeadModel, ...]

    def encode(self, text: str) -> list[int]:
        """The tokens of a conversation up to its second question."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    @torch.no_grad()
    def states(self, texts: Sequence[str], hidden: float = 0.0, seed: int = 0) -> list[Tensor]:
        """The last hidden states of each conversation, [tokens, members * width].

        Args:
            hidden: share of the tokens that it does not see. seed: decides which.
        """
        draw = torch.Generator().manual_seed(seed)
        rows = [self.encode(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), _CAPTURED_AT_ONCE):
            part = order[start : start + _CAPTURED_AT_ONCE]
            ids, lengths = _pad([rows[i] for i in part])
            seen = _hide(ids, hidden, self.tokenizer, draw)
            out = torch.cat([one.transformer(seen).last_hidden_state for one in self.networks], -1)
            found |= {i: out[k, : lengths[k]].clone() for k, i in enumerate(part)}
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()
    def rating_probs(self, states: Sequence[Tensor]) -> Tensor:
        """The probabilities of the rating words that would follow, [n, 5]."""
        last = torch.stack([one[-1] for one in states]).chunk(len(self.networks), -1)
        pairs = zip(self.networks, last, strict=True)
        probs = torch.stack([_rating_logits(one, self.tokenizer, state).softmax(-1) for one, state in pairs])
        return probs.mean(0)

    def rate(self, states: Sequence[Tensor]) -> Tensor:
        """The expected score of the rating word that would follow, [n] on the scale."""
        return self.rating_probs(states) @ torch.tensor(RATING_LEVELS)


def train(texts: Sequence[str], scores: Tensor, wording: Sequence[str], recipe: Recipe, seed: int = 0) -> LanguageModel:
    """Trains for a fixed number of epochs: nothing is chosen on the way.

    Args:
        texts: conversations up to the second question.
        scores: [n] human scores, which give the rating word to learn at the end of each.
        wording: what all of them have in common; each such text is one token.
    """
    tokenizer = _train_tokenizer(texts, wording, recipe.vocabulary)
    rows = [tokenizer.encode(text).ids for text in texts]
    torch.manual_seed(seed)
    neighbours = recipe.spread * _neighbours(rows, tokenizer.get_vocab_size(), recipe.width)
    wanted = _word_shares(scores, recipe.blur)
    return LanguageModel(
        tokenizer,
        tuple(
            _train_network(tokenizer, rows, wanted, neighbours, recipe, recipe.members * seed + member)
            for member in range(recipe.members)
        ),
    )


def _train_network(
    tokenizer: Tokenizer, rows: list[list[int]], wanted: Tensor, neighbours: Tensor, recipe: Recipe, seed: int
) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    network = _network(tokenizer, recipe)
    network.transformer.wte.weight.data.copy_(neighbours)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
    )
    steps = recipe.epochs * -(-len(rows) // recipe.batch_size)
    network.train()
    for step, batch in enumerate(_batches(rows, recipe), start=1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(step / recipe.warmup, 1) * (1 - 0.9 * step / steps)
        loss = _loss(network, tokenizer, [rows[i] for i in batch], wanted[batch], recipe)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(network)
    network.load_state_dict(averaged.module.state_dict())
    return network.eval()


def _train_tokenizer(texts: Sequence[str], wording: Sequence[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD, UNKNOWN, HIDDEN, *_RATINGS, *wording],
        show_progress=False,
    )
    plain = (_without(text, wording) for text in texts)
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def _without(text: str, wording: Sequence[str]) -> str:
    for part in wording:
        text = text.replace(part, " ")
    return text


def _network(tokenizer: Tokenizer, recipe: Recipe) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=256,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def _neighbours(rows: Sequence[list[int]], size: int, width: int) -> Tensor:
    """Embeddings [size, width] of unit spread, such that tokens with like neighbours are alike."""
    counts = torch.zeros(size, size, dtype=torch.float64)
    for row in rows:
        ids = torch.tensor(row)
        for apart in range(1, _WINDOW + 1):
            near = torch.full((max(len(ids) - apart, 0),), 1 / apart, dtype=torch.float64)
            counts.index_put_((ids[apart:], ids[:-apart]), near, accumulate=True)
    joint = (counts + counts.T) / (2 * counts.sum())
    single = joint.sum(1, keepdim=True) + 1e-9
    ppmi = (joint.clamp_min(1e-12) / (single * single.T)).log().clamp_min(0).float()
    left, values, _ = torch.svd_lowrank(ppmi, q=width, niter=4)
    found: Tensor = left * values.sqrt()
    return found / found.std()


def _word_shares(scores: Tensor, blur: float) -> Tensor:
    """Scores [n] -> how much of each falls to each rating word [n, 5], in five bins of equal width."""
    edges = torch.linspace(0, SCALE_MAX, len(RATING_WORDS) + 1)
    edges[0], edges[-1] = -torch.inf, torch.inf
    below = torch.special.ndtr((edges - scores[:, None]) / blur)
    return below[:, 1:] - below[:, :-1]


def _batches(rows: Sequence[list[int]], recipe: Recipe) -> Iterator[list[int]]:
    """All epochs' batches, each of similar lengths."""
    size = recipe.batch_size
    for _ in range(recipe.epochs):
        order = torch.randperm(len(rows)).tolist()
        pools = [sorted(order[i : i + 8 * size], key=lambda i: len(rows[i])) for i in range(0, len(order), 8 * size)]
        cut = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
        yield from (cut[i] for i in torch.randperm(len(cut)).tolist())


def _loss(
    network: GPT2LMHeadModel, tokenizer: Tokenizer, rows: Sequence[list[int]], wanted: Tensor, recipe: Recipe
) -> Tensor:
    """The next token's cross-entropy, at a share of the places, and that of the rating word."""
    ids, lengths = _pad(rows)
    states = network.transformer(_hide(ids, recipe.hidden, tokenizer)).last_hidden_state
    following = ids[:, 1:]
    real = torch.arange(1, ids.shape[1]) < lengths[:, None]
    chosen = real & (torch.rand(following.shape) < recipe.learnt)
    of_words = F.cross_entropy(network.lm_head(states[:, :-1][chosen]), following[chosen])
    last = states[torch.arange(len(ids)), lengths - 1]
    return of_words + F.cross_entropy(_rating_logits(network, tokenizer, last), wanted)


def _rating_logits(network: GPT2LMHeadModel, tokenizer: Tokenizer, states: Tensor) -> Tensor:
    ids = [tokenizer.token_to_id(word) for word in _RATINGS]
    return F.linear(states, network.lm_head.weight[ids])


def _hide(ids: Tensor, share: float, tokenizer: Tokenizer, draw: torch.Generator | None = None) -> Tensor:
    """The same tokens with some replaced; those that begin the vocabulary, wording and pads, never are."""
    if not share:
        return ids
    known = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    gone = (torch.rand(ids.shape, generator=draw) < share) & (ids > max(known.values()))
    return ids.masked_fill(gone, known[HIDDEN])


def _pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded with 0, the id of the pad: [n, tokens] and the lengths [n]."""
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return padded, torch.tensor([len(row) for row in rows])
