"""What the tiny model is made of: an Idefics3 of a few million parameters, its tokenizer and processor.

The same builder makes the random-weight models that tests and benchmarks load, so every shape
that can be asked for here loads in transformers and in vLLM alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

# The processor without torchvision: a CPU machine has none that loads.
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.conversation import questions

BOS = "<|begin_of_text|>"
PAD = "<|pad|>"
END = "<end_of_utterance>"
IMAGE = "<image>"
SPECIAL_TOKENS = (PAD, BOS, END, "<fake_token_around_image>", IMAGE, "<global-img>")
MAX_POSITIONS = 4096

# Idefics3's own template, unchanged.
CHAT_TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The dimensions of a model; the defaults are small and quick (`SHIPPED` has more tokens and layers).

    Attributes:
        text_head_dim: one of 32, 64, 80, 96, 112, 128, ...: those that vLLM's CPU attention has.
    """

    image_size: int = 128
    patch_size: int = 8
    scale_factor: int = 4
    vision_width: int = 192
    vision_layers: int = 3
    vision_mlp: int = 384
    vision_heads: int = 3
    text_width: int = 192
    text_layers: int = 4
    text_mlp: int = 512
    text_head_dim: int = 64

    @property
    def image_tokens(self) -> int:
        """How many tokens of the language side one image takes."""
        return (self.image_size // self.patch_size // self.scale_factor) ** 2


SHIPPED = Size(scale_factor=2, vision_layers=4, text_head_dim=32)


def _fixed_texts() -> list[str]:
    """Texts that every conversation holds."""
    asked = [questions(aspect, "a red cube", "v1") for aspect in Aspect]
    return [f"User:{q.first} Assistant: User: {q.second}\n" for q in asked]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer fitted to `texts`; any text can be encoded, by bytes at worst.

    The five rating words with a leading blank are made single tokens, which is how they stand at
    the answer position of the template.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Merges follow frequency, so these come first whatever the texts are.
    fixed = [" " + " ".join(RATING_WORDS)] * 100_000
    bpe.train_from_iterator([*texts, *_fixed_texts() * 100, *fixed], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    for word in RATING_WORDS:
        if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) != 1:
            raise ValueError(f"{word!r} is not one token: the vocabulary of {vocab_size} is too small")
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast, size: Size) -> Idefics3Processor:
    """The processor: one square view of the image, never split into tiles."""
    edge = {"longest_edge": size.image_size}
    image_processor = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=size.image_tokens, chat_template=CHAT_TEMPLATE)


def build(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Idefics3ForConditionalGeneration:
    """A model with random weights for `tokenizer`."""
    heads, rest = divmod(size.text_width, size.text_head_dim)
    if rest:
        raise ValueError(f"text_width {size.text_width} is no multiple of text_head_dim {size.text_head_dim}")
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size.text_head_dim,
        initializer_range=_spread(size.text_width),
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **ids,
    )
    vision = Idefics3VisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
        initializer_range=_spread(size.vision_width),
    )
    config = Idefics3Config(
        text_config=text,
        vision_config=vision,
        scale_factor=size.scale_factor,
        image_token_id=tokenizer.added_tokens_encoder[IMAGE],
        tie_word_embeddings=False,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model.eval()


def _spread(width: int) -> float:
    """The deviation of initial weights: the usual 0.02 is meant for widths near 768."""
    return round(0.02 * (768 / width) ** 0.5, 4)


def save(folder: Path, model: Idefics3ForConditionalGeneration, processor: Idefics3Processor) -> None:
    """Writes what `AutoModelForImageTextToText`, `AutoProcessor` and vLLM load."""
    folder.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def write_random_model(folder: str | Path, size: Size | None = None, *, vocabulary: int = 1024, seed: int = 0) -> Path:
    """Saves a model of `size` with random weights, for tests and benchmarks; returns its folder."""
    size = size or Size(vision_layers=2, text_layers=2)
    tokenizer = train_tokenizer(_filler(vocabulary), vocabulary)
    model = build(size, tokenizer, seed)
    save(Path(folder), model, build_processor(tokenizer, size))
    return Path(folder)


def _filler(vocabulary: int) -> list[str]:
    """Made-up words, enough of them for a vocabulary of that many entries."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "en", "or")]
    words: list[str] = []
    for i in range(vocabulary):
        a, rest = i % len(syllables), i // len(syllables)
        words.append(syllables[a] + syllables[(a * 7 + rest * 13) % len(syllables)] + syllables[rest % len(syllables)])
    return [" ".join(words)] * 2
