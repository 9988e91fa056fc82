"""Many pictures in one, with labels: a row for each prompt or model, a column for each seed, model or prompt."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 13
GAP = 6
LABEL_WIDTH = 180
"""Most pixels of a row's label; longer ones are wrapped."""
LINE_SPACING = 4

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], headings: Sequence[str]) -> Image.Image:
    """`rows` of (label, pictures) under `headings`. Cells have the size of the largest picture; a row may have fewer pictures
    than there are headings."""
    font = ImageFont.load_default(size=FONT_SIZE)
    pictures = [picture for _, row in rows for picture in row]
    width, height = (max(picture.size[side] for picture in pictures) for side in (0, 1))
    tops = [_wrapped(heading, width, font) for heading in headings]
    labels = [_wrapped(label, LABEL_WIDTH, font) for label, _ in rows]
    head = max(_size(text, font)[1] for text in tops) + 2 * GAP
    margin = max(_size(text, font)[0] for text in labels) + 2 * GAP
    heights = [max(height, _size(text, font)[1]) + GAP for text in labels]

    sheet = Image.new("RGB", (margin + len(headings) * (width + GAP), head + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(tops):
        pen.multiline_text((margin + column * (width + GAP), GAP), text, fill="black", font=font, spacing=LINE_SPACING)
    top = head
    for (_, row), text, taken in zip(rows, labels, heights, strict=True):
        middle = top + (taken - GAP - _size(text, font)[1]) // 2
        pen.multiline_text((GAP, middle), text, fill="black", font=font, spacing=LINE_SPACING)
        for column, picture in enumerate(row):
            sheet.paste(picture, (margin + column * (width + GAP), top))
        top += taken
    return sheet


def _wrapped(text: str, width: int, font: Font) -> str:
    """`text` in lines of at most `width` pixels, broken between words; a word that is longer stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _size(text: str, font: Font) -> tuple[int, int]:
    """Pixels that it takes, (width, height)."""
    lines = text.split("\n")
    height = len(lines) * (FONT_SIZE + LINE_SPACING)
    return max(int(font.getlength(line)) for line in lines) + 1, height
