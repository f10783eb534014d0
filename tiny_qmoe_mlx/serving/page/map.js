// The map of experts: a column a layer, experts from top to bottom, side by side in it where there are very many.
"use strict";

const ABSENT = 0, RESIDENT = 1, LOADING = 2, HIT = 3; // a use flashes as HIT or LOADING, and fades in SHADES steps
const SHADES = 8;
const FLASH = HIT + 1;
const FADE_MS = 700;
const SPOKEN = ["on disk", "in memory", "loading"];
const COLOUR_NAMES = ["--absent", "--resident", "--loading", "--hit"];

const map = {
  layers: [], start: [], cells: 0, layerOf: new Uint16Array(0), state: new Uint8Array(0), use: new Float64Array(0),
  flashed: new Float64Array(0), flash: new Uint8Array(0), drawn: new Uint8Array(0), palette: [], shape: null,
  selected: -1, frame: 0, polled: 0,
};

/** Colours by index: the four states, then the shades of a hit and of a load on their way to `absent` or `resident`. */
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const states = COLOUR_NAMES.map((name) => style.getPropertyValue(name).trim());
  const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [absent, resident, loading, hit] = states.map(parts);
  const mix = (from, to, part) => `rgb(${from.map((c, i) => Math.round(c + (to[i] - c) * part)).join(" ")})`;
  const shades = (from, to) => Array.from({ length: SHADES }, (_, step) => mix(from, to, step / SHADES));
  const ways = [[hit, absent], [hit, resident], [loading, absent], [loading, resident]];
  return [...states, ...ways.flatMap(([from, to]) => shades(from, to))];
}

/** Take on the layers of a model; what was known of another one is dropped. */
function reshape(layers) {
  const same = map.layers.length === layers.length && layers.every(
    (l, i) => l.layer === map.layers[i].layer && l.experts === map.layers[i].experts);
  map.layers = layers;
  if (same) return false;
  map.start = [];
  map.cells = 0;
  for (const { experts } of layers) {
    map.start.push(map.cells);
    map.cells += experts;
  }
  map.layerOf = new Uint16Array(map.cells);
  layers.forEach(({ experts }, i) => map.layerOf.fill(i, map.start[i], map.start[i] + experts));
  map.state = new Uint8Array(map.cells);
  map.use = new Float64Array(map.cells).fill(NaN);
  map.flashed = new Float64Array(map.cells).fill(-Infinity);
  map.flash = new Uint8Array(map.cells);
  map.shape = null;
  select(-1);
  return true;
}

/** One poll's states and uses. An expert used since the last one flashes, the brighter the more of its layer's uses it
 *  had: as a hit if it was in memory before. */
function update(states, uses, now) {
  map.polled = now;
  map.layers.forEach(({ experts }, layer) => {
    const letters = states[layer] ?? "", counts = uses?.[layer] ?? [], start = map.start[layer];
    const most = counts.reduce((high, count, expert) => Math.max(high, count - map.use[start + expert] || 0), 0);
    for (let expert = 0, cell = start; expert < experts; expert++, cell++) {
      const count = counts[expert] ?? 0;
      if (count > map.use[cell]) { // never so at the first poll: NaN
        map.flash[cell] = map.state[cell] === RESIDENT ? HIT : LOADING;
        map.flashed[cell] = now - 0.7 * FADE_MS * (1 - (count - map.use[cell]) / most);
      }
      map.use[cell] = count;
      map.state[cell] = letters[expert] === "r" ? RESIDENT : letters[expert] === "l" ? LOADING : ABSENT;
    }
  });
}

/** Whole device pixels for a layer's block and the cells in it: as large as the room allows, the short side first. */
function fit(layers, experts, width, height, pixel) {
  const most = Math.round(18 * pixel);
  const pitch = Math.max(1, Math.min(most, Math.floor(width / layers)));
  const gap = pitch >= 4 * pixel ? Math.round(pixel) : 0; // between layers
  let best = null;
  for (let across = 1; across <= Math.min(experts, pitch - gap || 1); across++) {
    const rows = Math.ceil(experts / across);
    const cell = Math.floor((pitch - gap || 1) / across);
    const high = Math.max(1, Math.min(most, Math.floor(height / rows)));
    const fits = rows * high <= 1.1 * height || across >= pitch - gap;
    const short = Math.min(cell, high), long = Math.min(Math.max(cell, high), 3 * short);
    const worth = (short + 0.25 * long) * (experts % across ? 0.85 : 1); // a short last row looks wrong
    if (fits && !(worth <= best?.worth)) best = { across, rows, cell, high, worth };
  }
  const { across, rows, cell, high } = best;
  const space = high >= 4 * pixel ? Math.round(pixel) : 0; // between experts
  const wide = across > 1 && cell >= 4 * pixel ? cell - space : cell;
  return { block: across * cell + gap, across, rows, cell, high, wide, tall: high - space, pixel,
    width: layers * (across * cell + gap) - gap, height: rows * high - space };
}

function layout() {
  const experts = Math.max(0, ...map.layers.map((l) => l.experts));
  byId("map").hidden = !map.cells;
  if (!map.cells || !byId("field").clientWidth) return;
  const pixel = window.devicePixelRatio || 1, canvas = byId("cells");
  const room = parseFloat(getComputedStyle(byId("field")).getPropertyValue("--room")) * window.innerHeight / 100;
  const shape = fit(map.layers.length, experts, byId("field").clientWidth * pixel, room * pixel, pixel);
  map.shape = shape;
  canvas.width = shape.width;
  canvas.height = shape.height;
  canvas.style.width = `${shape.width / pixel}px`;
  canvas.style.height = `${shape.height / pixel}px`;
  byId("layer-axis").style.width = canvas.style.width;
  byId("expert-first").textContent = "0";
  byId("expert-last").textContent = String(experts - 1);
  byId("layer-first").textContent = String(map.layers[0].layer);
  byId("layer-last").textContent = String(map.layers.at(-1).layer);
  repaint();
  point();
}

const expertOf = (cell) => cell - map.start[map.layerOf[cell]];
const leftOf = (cell) => map.layerOf[cell] * map.shape.block + (expertOf(cell) % map.shape.across) * map.shape.cell;
const topOf = (cell) => Math.floor(expertOf(cell) / map.shape.across) * map.shape.high;

function colour(cell, now) {
  const age = Math.max(0, now - map.flashed[cell]) / FADE_MS, state = map.state[cell];
  if (age >= 1 || state === LOADING) return state;
  const way = (map.flash[cell] === HIT ? 0 : 2) + (state === ABSENT ? 0 : 1);
  return FLASH + way * SHADES + Math.floor(age * SHADES);
}

/** Draw what changed since the last frame, colour by colour; goes on by itself while something fades. */
function paint() {
  map.frame = 0;
  if (!map.shape) return;
  const now = stillness.matches ? map.polled : performance.now(); // without motion, a poll's picture stays as it is
  const changed = new Map(), { wide, tall } = map.shape;
  let fading = false;
  for (let cell = 0; cell < map.cells; cell++) {
    const index = colour(cell, now);
    fading ||= index >= FLASH;
    if (index === map.drawn[cell]) continue;
    map.drawn[cell] = index;
    if (!changed.has(index)) changed.set(index, []);
    changed.get(index).push(cell);
  }
  const context = byId("cells").getContext("2d");
  for (const [index, cells] of changed) {
    context.fillStyle = map.palette[index];
    for (const cell of cells) context.fillRect(leftOf(cell), topOf(cell), wide, tall);
  }
  if (fading && !stillness.matches) schedule();
}

function schedule() {
  map.frame ||= requestAnimationFrame(paint);
}

function repaint() {
  map.drawn = new Uint8Array(map.cells).fill(255);
  schedule();
}

/** The cell under a point of the canvas in CSS pixels, or -1. */
function cellAt(x, y) {
  const { block, across, cell, high, pixel } = map.shape;
  const layer = Math.floor((x * pixel) / block);
  const side = Math.floor(((x * pixel) % block) / cell);
  const expert = Math.floor((y * pixel) / high) * across + side;
  if (!map.layers[layer] || side >= across || expert < 0 || expert >= map.layers[layer].experts) return -1;
  return map.start[layer] + expert;
}

function describe(cell) {
  const layer = map.layerOf[cell], { experts, record_bytes: bytes } = map.layers[layer];
  const uses = map.use.subarray(map.start[layer], map.start[layer] + experts).reduce((sum, count) => sum + count, 0);
  const use = map.use[cell];
  const part = uses ? `, ${number((100 * use) / uses, 1)}% of its layer's uses` : "";
  return [
    `Layer ${map.layers[layer].layer}, expert ${expertOf(cell)}`,
    `${SPOKEN[map.state[cell]]}, ${size(bytes).join(" ")}`,
    `used ${number(use)} ${use === 1 ? "time" : "times"}${part}`,
  ];
}

function select(cell) {
  map.selected = cell;
  point();
}

/** Frame the selected cell, and say beside it what it is. */
function point() {
  const shown = map.selected >= 0 && map.shape !== null, tip = byId("tip"), cursor = byId("cursor");
  tip.hidden = cursor.hidden = !shown;
  if (!shown) return;
  const { pixel, wide, tall } = map.shape, x = leftOf(map.selected) / pixel, y = topOf(map.selected) / pixel;
  const px = (value) => `${value}px`, frame = cursor.style;
  Object.assign(frame, { left: px(x - 2), top: px(y - 2), width: px(wide / pixel + 4), height: px(tall / pixel + 4) });
  describe(map.selected).forEach((line, i) => (tip.children[i].textContent = line));
  const field = byId("field");
  const above = y > tip.offsetHeight + 12;
  tip.style.left = `${Math.max(0, Math.min(x - 20, field.clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${above ? y - tip.offsetHeight - 10 : y + tall / pixel + 10}px`;
}

/** Arrow keys go from expert to expert; true when the key was one of them. */
function moveSelection(key) {
  if (!map.cells) return false;
  const layer = map.selected < 0 ? 0 : map.layerOf[map.selected];
  const expert = map.selected < 0 ? -1 : expertOf(map.selected);
  const sideways = { ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0;
  const ways = { ArrowUp: expert - 1, ArrowDown: expert + 1, PageUp: expert - 10, PageDown: expert + 10,
    Home: 0, End: Infinity };
  if (!sideways && !(key in ways)) return false;
  const to = Math.max(0, Math.min(map.layers.length - 1, layer + sideways));
  const next = Math.max(0, Math.min(map.layers[to].experts - 1, sideways ? expert : ways[key]));
  select(map.start[to] + next);
  byId("spoken").textContent = describe(map.selected).join(": ");
  return true;
}
