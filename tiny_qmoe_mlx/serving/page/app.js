// The figures beside the map and the polls that bring them, settings, appearance, and the start of the page.
"use strict";

const POLL_MS = 250, CALM_MS = 1000, IDLE_MS = 1500, GONE_MS = 3000; // calm: where motion is not wanted
const poll = { timer: 0, running: false, model: null };

function showFigures(stats) {
  const known = (value) => typeof value === "number" && Number.isFinite(value);
  byId("rate").textContent = known(stats.tokens_per_second) ? rate(stats.tokens_per_second) : "–";
  const percent = 100 * stats.hit_rate;
  byId("hits").textContent = known(stats.hit_rate) ? `${number(percent, percent === 100 ? 0 : 1)}%` : "–";
  const [read, unit] = stats.bytes_per_token > 0 ? size(stats.bytes_per_token)
    : [stats.bytes_per_token === 0 ? "0" : "–", "GB"];
  byId("read").textContent = read;
  byId("read-unit").textContent = `${unit} per token`;
  const { held_bytes: held, pool_bytes: pool, budget_bytes: budget } = stats;
  if (known(held) && budget > 0) showMemory(held, pool || 0, budget);
  const queue = [];
  if (known(stats.active)) queue.push(`${number(stats.active)} answering`);
  if (stats.waiting) queue.push(`${number(stats.waiting)} waiting`);
  if (known(stats.tokens)) queue.push(`${number(stats.tokens)} tokens written`);
  if (known(stats.context)) queue.push(`context of ${number(stats.context)}`);
  byId("queue").textContent = queue.join(" · ");
}

/** Bytes held and budget, of which the pool of experts is a part. */
function showMemory(held, pool, budget) {
  const text = `${size(held).join(" ")} of ${size(budget).join(" ")}`, part = Math.min(100, (100 * held) / budget);
  byId("memory-text").textContent = text;
  byId("memory").setAttribute("aria-valuenow", String(Math.round(part)));
  byId("memory").setAttribute("aria-valuetext", `${text}, the pool of experts ${size(pool).join(" ")}`);
  byId("memory").classList.toggle("over", held > budget);
  byId("memory-pool").style.width = `${(part * Math.min(pool, held)) / Math.max(held, 1)}%`;
  byId("memory-rest").style.width = `${(part * Math.max(held - pool, 0)) / Math.max(held, 1)}%`;
}

function showExperts(data) {
  const isNew = reshape(data.layers);
  update(data.state, data.use, performance.now());
  poll.model = data.model;
  byId("model").textContent = byId("model").title = data.model;
  showFigures(data.stats);
  const inMemory = map.state.reduce((sum, state) => sum + (state === RESIDENT), 0);
  const part = inMemory === map.cells ? "all" : `${number(inMemory)} of`;
  const text = map.cells ? `${part} ${number(map.cells)} in memory` : "This model has no routed experts.";
  byId("residence").textContent = text;
  byId("cells").setAttribute("aria-label", `${map.layers.length} layers of experts, ${text}`);
  if (isNew || !map.shape) layout();
  else point();
  schedule();
}

function showConnection(state, text) {
  const shown = byId("connection-text");
  if (shown.textContent === text) return; // a live region: say it once
  byId("connection").dataset.state = state;
  shown.textContent = text;
  byId("experts").classList.toggle("stale", state !== "here");
  byId("unlock").hidden = state !== "locked";
}

async function pollOnce() {
  const reply = await request("experts", {});
  if (reply.status === 401) return showConnection("locked", "Token needed");
  if (!reply.ok) return showConnection("odd", (await refusalOf(reply)).message);
  const data = await reply.json();
  showExperts(data);
  showConnection("here", "Connected");
  return data;
}

/** Ask again and again; one request at a time, none while nobody looks or while the token is refused. */
async function pollOn() {
  clearTimeout(poll.timer);
  if (poll.running || document.hidden || tokenRefused) return;
  poll.running = true;
  let wait = GONE_MS;
  try {
    const data = await pollOnce();
    if (data) wait = !(data.stats.active || chat.running) ? IDLE_MS : stillness.matches ? CALM_MS : POLL_MS;
  } catch (error) {
    if (error.code === "unreachable") showConnection("gone", "Server not reachable");
    else showConnection("odd", `The map cannot be read: ${error.message}`);
  }
  poll.running = false;
  poll.timer = setTimeout(pollOn, wait);
}

// ---- Settings and appearance

function switchTheme() {
  const wanted = isDark() ? "light" : "dark";
  const system = systemDark.matches ? "dark" : "light";
  keep("localStorage", "theme", wanted === system ? null : wanted); // back at the system's choice, it is followed again
  themeChanged();
}

function themeChanged() {
  showTheme();
  byId("theme").setAttribute("aria-pressed", String(isDark()));
  map.palette = readPalette();
  repaint();
}

function openSettings() {
  const { system, max_tokens, temperature } = settings();
  fillSettings({ system, max_tokens, temperature });
  byId("settings").returnValue = ""; // else Escape would leave what the last time ended with
  byId("settings").showModal();
}

function fillSettings({ system, max_tokens, temperature }) {
  byId("system").value = system;
  byId("max-tokens").value = max_tokens ?? "";
  byId("temperature").value = temperature;
  showTemperature();
}

function showTemperature() {
  byId("temperature-value").textContent = number(byId("temperature").valueAsNumber, 1);
}

function keepSettings() {
  if (byId("settings").returnValue !== "done") return;
  const tokens = byId("max-tokens").valueAsNumber; // NaN where it was left empty
  keep("localStorage", "settings", { system: byId("system").value, max_tokens: tokens || null,
    temperature: byId("temperature").valueAsNumber });
}

function on(id, event, action) {
  byId(id).addEventListener(event, action);
}

function listenChat() {
  on("composer", "submit", (event) => { event.preventDefault(); send(byId("prompt").value); });
  on("prompt", "keydown", promptKey);
  on("prompt", "input", () => { chat.recalled = 0; growPrompt(); });
  on("stop", "click", stop);
  on("new-chat", "click", newChat);
  on("latest", "click", toEnd);
  on("log", "scroll", () => (byId("latest").hidden = nearEnd()));
  for (const starter of document.querySelectorAll(".starter")) {
    starter.addEventListener("click", () => { send(starter.textContent); byId("prompt").focus(); });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
    select(-1);
    stop();
  });
}

function listenMap() {
  const canvas = byId("cells");
  canvas.addEventListener("pointermove", (event) => map.shape && select(cellAt(event.offsetX, event.offsetY)));
  canvas.addEventListener("pointerdown", (event) => map.shape && select(cellAt(event.offsetX, event.offsetY)));
  canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && select(-1));
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && map.selected < 0 && moveSelection("Home"));
  canvas.addEventListener("blur", () => select(-1));
  canvas.addEventListener("keydown", (event) => {
    const plain = !(event.altKey || event.ctrlKey || event.metaKey); // with these, arrows are the browser's own
    if (plain && moveSelection(event.key)) event.preventDefault();
  });
  new ResizeObserver(() => layout()).observe(byId("field"));
  window.addEventListener("resize", layout);
}

function listenSettings() {
  on("open-settings", "click", openSettings);
  on("settings", "close", keepSettings);
  on("defaults", "click", () => fillSettings(DEFAULTS));
  on("temperature", "input", showTemperature);
  on("theme", "click", switchTheme);
  systemDark.addEventListener("change", themeChanged);
  stillness.addEventListener("change", repaint);
  on("cancel", "click", () => byId("lock").close());
  on("unlock", "click", () => { tokenRefused = false; pollOn(); });
  on("fold", "click", () => {
    const open = byId("experts").classList.toggle("folded");
    byId("fold").setAttribute("aria-expanded", String(!open));
  });
}

document.addEventListener("DOMContentLoaded", () => {
  listenChat();
  listenMap();
  listenSettings();
  themeChanged();
  chat.messages = kept("sessionStorage", "messages", []);
  for (const message of chat.messages) {
    const article = showMessage(message);
    if (message.role === "assistant") finishMessage(article, message);
  }
  toEnd();
  document.addEventListener("visibilitychange", pollOn);
  pollOn();
});
