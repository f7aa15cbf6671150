"""Prompts as people write them: wrappings for a scene, and prompts about things no scene holds."""

import numpy as np

STYLES: tuple[str, ...] = (
    "a photo of {}",
    "A picture of {}.",
    "{}, highly detailed",
    "{}, digital art, 4k",
    "an oil painting of {}",
    "{}, soft light, trending on artstation",
    "Please draw {}. Make it look real.",
    "a realistic render of {}, sharp focus",
)

_SUBJECTS = (
    "a woman with long hair", "an old man", "a golden retriever", "a cat", "a knight in armor", "two children",
    "a bowl of fruit", "a steaming cup of coffee", "a red sports car", "the Eiffel Tower", "a dragon", "a robot",
    "a medieval castle", "a spaceship", "a wolf", "a crowded market", "a bouquet of roses", "an astronaut",
    "a lighthouse", "a vintage bicycle", "a samurai", "a girl in a blue dress", "a waterfall", "a city skyline",
    "a plate of sushi", "a horse", "a small wooden house", "a portrait of a queen", "a whale", "an owl",
)  # fmt: skip
_SETTINGS = (
    "in a dark forest", "at sunset", "in the rain", "on a busy street in Tokyo", "under a starry sky", "in a library",
    "on the moon", "by a window", "in a futuristic city", "on a mountain top", "in a desert", "underwater",
    "at night with neon lights", "in a garden full of flowers", "during a thunderstorm", "in the kitchen",
)  # fmt: skip
_DEEDS = (
    "reading a book", "smiling at the camera", "running fast", "playing chess", "holding an umbrella", "dancing",
    "looking away", "eating", "sleeping", "covered in snow", "made of glass", "wearing sunglasses",
)  # fmt: skip
_FINISHES = (
    "oil on canvas", "watercolor", "cinematic lighting, 8k", "in the style of Van Gogh", "studio photo, 85mm lens",
    "trending on artstation", "unreal engine, octane render", "black and white", "concept art", "pixel art",
    "highly detailed, intricate, elegant", "anime", "low poly", "a pencil sketch", "vaporwave",
)  # fmt: skip
_SENTENCES = (
    "The mood is calm.", "The background is blurred.", "Light falls from the left.", "Everything is very colorful!",
    "No text, no watermark.", "It reminds one of an old film.", "Wide shot.", "The colours are warm and soft.",
)  # fmt: skip


def foreign_prompt(rng: np.random.Generator) -> str:
    """A prompt that asks for nothing that the scenes can show; short, long or of several sentences."""
    if rng.random() < 0.25:
        return _unreadable(rng)
    parts = [str(rng.choice(_SUBJECTS))]
    if rng.random() < 0.5:
        parts.append(str(rng.choice(_DEEDS)))
    if rng.random() < 0.6:
        parts.append(str(rng.choice(_SETTINGS)))
    text = " ".join(parts)
    if rng.random() < 0.5:
        text += ", " + str(rng.choice(_FINISHES))
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + ". " + " ".join(rng.choice(_SENTENCES, int(rng.integers(1, 4))))
    return text


def _unreadable(rng: np.random.Generator) -> str:
    """Words of no language that was trained on, so that the answers stay sensible on any text."""
    words = []
    for _ in range(int(rng.integers(2, 22))):
        word = "".join(chr(int(c)) for c in rng.choice(_LETTERS, int(rng.integers(2, 7))))
        words.append(word.capitalize() if rng.random() < 0.2 else word)
    text = str(rng.choice([" ", ", ", " "])).join(words)
    return text + str(rng.choice(["", ".", "!", " --ar 16:9 --v 5", " (masterpiece:1.2)", " <lora:x>", " {a|b}"]))


_LETTERS = [*range(97, 123)] * 6 + [
    *range(0x30, 0x3A),
    *range(0xE0, 0xF6),
    *range(0x430, 0x440),
    *range(0x4E00, 0x4E10),
]
