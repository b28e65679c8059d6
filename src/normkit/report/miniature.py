"""The small pictures of the table of verdicts: an effect's interval against its rule's line, and a claim's figure."""

import math
from xml.sax.saxutils import quoteattr

from ..lab.verdicts import Answer
from .language import ENGLISH, Language, effect_in_words

__all__ = ["interval_picture"]

WIDTH, HEIGHT, MARGIN = 160, 30, 10


def interval_picture(part: Answer, lang: Language = ENGLISH) -> str:
    """Return an SVG: the interval a bar, the effect a dot, the line dashed, the band shaded where there is one.

    The side on which the claim holds is shaded. The scale is the picture's own: line, band and interval fill it.
    """
    words = quoteattr(effect_in_words(part, lang))
    head = f'<svg class="interval" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label={words}>'
    numbers = [number for number in (part.effect, part.low, part.high) if number is not None and math.isfinite(number)]
    if not numbers:
        return f"{head}</svg>"
    threshold, band = part.rule.line, part.rule.band
    ends = [*numbers, threshold, *(band or ())]
    least, most = min(ends), max(ends)
    span = (most - least) or 1.0

    def at(value: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * ((value - least) / span if most > least else 0.5)

    line, middle = at(threshold), HEIGHT / 2
    left, right = (line, WIDTH) if part.rule.direction == "above" else (0, line)
    shapes = [
        f'<rect class="holds" x="{left:.1f}" y="2" width="{right - left:.1f}" height="{HEIGHT - 4}"/>',
        f'<line class="threshold" x1="{line:.1f}" x2="{line:.1f}" y1="1" y2="{HEIGHT - 1}"/>',
    ]
    if band is not None:
        start, end = at(band[0]), at(band[1])
        shapes.insert(1, f'<rect class="band" x="{start:.1f}" y="2" width="{end - start:.1f}" height="{HEIGHT - 4}"/>')
    if part.low is not None and part.high is not None:
        # An interval of no width is still to be seen.
        low, high = at(part.low), max(at(part.high), at(part.low) + 1.5)
        shapes.append(f'<rect class="bar" x="{low:.1f}" y="{middle - 3}" width="{high - low:.1f}" height="6" rx="2"/>')
    if part.effect is not None and math.isfinite(part.effect):
        shapes.append(f'<circle class="dot" cx="{at(part.effect):.1f}" cy="{middle}" r="4.5"/>')
    return f"{head}{''.join(shapes)}</svg>"
