"""A picture beside bars of its most probable classes."""

from PIL import Image, ImageDraw, ImageFont

_HEIGHT = 320
_PANEL = 360
_MARGIN = 24
_INK = (32, 36, 44)
_BAR = (52, 120, 246)
_TRACK = (230, 233, 239)


def annotate(picture: Image.Image, classes: list[tuple[str, float]]) -> Image.Image:
    """Draw classes and their probabilities, in [0, 1], to the right of a picture."""
    width = max(round(picture.width * _HEIGHT / picture.height), 1)
    # Small scans show their pixels, photographs stay smooth.
    kind = Image.Resampling.NEAREST if picture.height < _HEIGHT // 4 else Image.Resampling.LANCZOS
    canvas = Image.new("RGB", (width + _PANEL, _HEIGHT), "white")
    canvas.paste(picture.convert("RGB").resize((width, _HEIGHT), kind), (0, 0))

    draw = ImageDraw.Draw(canvas)
    row = (_HEIGHT - 2 * _MARGIN) / max(len(classes), 1)
    size = max(min(round(row * 0.4), 20), 8)
    font = ImageFont.load_default(size)
    left, right = width + _MARGIN, width + _PANEL - _MARGIN
    for index, (name, probability) in enumerate(classes):
        top = _MARGIN + index * row
        percent = f"{100 * probability:.1f} %"
        percent_width = draw.textlength(percent, font)
        draw.text((left, top), _fit(draw, name, font, right - left - percent_width - size), _INK, font)
        draw.text((right - percent_width, top), percent, _INK, font)
        bar = (top + size * 1.4, top + size * 1.4 + max(row * 0.2, 3))
        draw.rounded_rectangle((left, bar[0], right, bar[1]), 3, _TRACK)
        if (length := (right - left) * probability) >= 1:
            draw.rounded_rectangle((left, bar[0], left + length, bar[1]), 3, _BAR)
    return canvas


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
