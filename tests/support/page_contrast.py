"""Contrast of what a page shows (WCAG 2.2, success criterion 1.4.3, level AA)."""

from typing import Any

_FAINT = r"""() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const channels = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const luminance = (colour) => {
    const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const aside = "noscript, script, style, :disabled, option, title, .sr, .skip, .masked, [aria-hidden=true]";
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim();
    const element = walk.currentNode.parentElement;
    const box = element.getBoundingClientRect();
    if (!text || !box.width || !box.height || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest(aside)) continue;
    const style = getComputedStyle(element);
    const layers = [];
    let opacity = 1;
    for (let at = element; at; at = at.parentElement) {
      const own = getComputedStyle(at);
      opacity *= Number(own.opacity);
      layers.push(channels(own.backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    if (opacity === 0) continue;
    let ground = [255, 255, 255, 1];
    for (const layer of layers.reverse()) ground = over(layer, ground);
    const ink = channels(element instanceof SVGElement ? style.fill : style.color);
    const shown = over([ink[0], ink[1], ink[2], ink[3] * opacity], ground);
    const [light, dark] = [luminance(shown), luminance(ground)].sort((first, second) => second - first);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const kind = element.className?.baseVal ?? element.className;
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${kind}: ${text.slice(0, 40)}`);
  }
  return [...new Set(found)];
}"""


def faint_texts(page: Any) -> list[str]:
    """Texts of a playwright page whose contrast with their ground is below 4.5 (large ones: 3), with the ratio."""
    return [str(text) for text in page.evaluate(_FAINT)]
