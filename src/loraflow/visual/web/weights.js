"use strict";

// What all pages share, before their own scripts. The constants are Python's, in the page's body.

const ALL = -1; // the layer that stands for the mean over all
const EVEN = Number(document.body.dataset.even);
const COLOURS = Number(document.body.dataset.colours);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const number = (weight, digits = 3) => weight.toFixed(digits).replace(/^-(0\.0+)$/, "$1").replace("-", "−");
const fill = (weight, full) => `${(100 * Math.min(Math.max(weight, 0) / full, 1)).toFixed(1)}%`;
const sliderText = (layer, layers) => (layer === ALL ? "all (mean)" : `${layer} of 0–${layers - 1}`);

/** The letter that stands for an adapter where its name has no room; its number after the 26th. */
const keyOf = (a) => (a < 26 ? String.fromCharCode(65 + a) : String(a + 1));

/** The largest weight's place, or null where the second is as large to three decimals; and its share of all. */
function dominating(weights) {
  const top = weights.indexOf(Math.max(...weights));
  const rest = weights.filter((_, a) => a !== top);
  const even = rest.length > 0 && weights[top] - Math.max(...rest) <= EVEN;
  const positive = weights.reduce((sum, weight) => sum + Math.max(weight, 0), 0);
  return { top: even ? null : top, share: Math.max(weights[top], 0) / (positive || 1) };
}

/** How strong a token's colour is: an adapter that leads by little must still be seen to lead. */
const strength = (share) => (0.25 + 0.75 * share).toFixed(3);
