// What the other scripts share: elements, storage, figures as text, the appearance, requests and their refusals.
// Text of the model and of the server reaches the page as text nodes only.
"use strict";

const byId = (id) => document.getElementById(id);

/** A new element with a class, text, and children. */
function make(tag, kind = "", ...content) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...content);
  return element;
}

function button(text, press) {
  const element = make("button", "", text);
  element.type = "button";
  element.addEventListener("click", press);
  return element;
}

const unstored = new Map(); // what a browser that forbids storage, or has none left, keeps until the page is closed

/** What a storage ("localStorage", "sessionStorage") keeps under a name, or else `otherwise`. */
function kept(storage, name, otherwise) {
  if (unstored.has(name)) return unstored.get(name) ?? otherwise;
  try {
    return JSON.parse(window[storage].getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a value; null takes it away. */
function keep(storage, name, value) {
  unstored.delete(name);
  try {
    if (value === null) window[storage].removeItem(name);
    else window[storage].setItem(name, JSON.stringify(value));
  } catch {
    unstored.set(name, value);
  }
}

const number = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const rate = (value) => number(value, value < 100 ? 1 : 0);

/** Bytes -> [figure, decimal unit], three digits. */
function size(bytes) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(Math.max(bytes, 1)) / 3)));
  const value = bytes / 1000 ** power;
  return [number(value, power === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2), ["B", "KB", "MB", "GB", "TB"][power]];
}

// ---- Appearance: the system's, or the one chosen here. This script runs in the head, so that nothing flashes.

const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
const stillness = window.matchMedia("(prefers-reduced-motion: reduce)");
const isDark = () => (kept("localStorage", "theme", null) ?? (systemDark.matches ? "dark" : "light")) === "dark";

function showTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
}

showTheme();

// ---- Requests

let asking = null; // the open question for a token: every request that meets 401 waits for the same answer
let tokenRefused = false;

/** Ask for the bearer token, once more if the server refused one; true when one was entered. */
function askToken(refused) {
  asking ??= new Promise((answer) => {
    const dialog = byId("lock");
    byId("token").value = "";
    byId("lock-refused").hidden = !refused;
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const entered = dialog.returnValue === "enter";
      if (entered) keep("sessionStorage", "token", byId("token").value.trim());
      byId("token").value = "";
      tokenRefused = !entered;
      answer(entered);
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** An error whose message is a sentence for the person, and OpenAI's code for it, or "unreachable". */
class Refusal extends Error {
  constructor(message, code = null) {
    super(message);
    this.code = code;
  }
}

/** fetch, with the token where one is needed. Where the person gives none, the 401 is the answer. */
async function request(path, { signal, ...options }) {
  for (;;) {
    const token = kept("sessionStorage", "token", null);
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    const reply = await reach(path, { ...options, headers, signal: signal ?? AbortSignal.timeout(15000) });
    if (reply.status !== 401) return reply;
    if (kept("sessionStorage", "token", null) !== token) continue; // it was entered meanwhile
    if (!(await askToken(token !== null))) return reply;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { ...options, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Start it again, or look at its terminal.", "unreachable");
  }
}

/** What an error reply says: OpenAI's shape, a bare string, or else the status. */
async function refusalOf(reply) {
  const status = `The server answered ${reply.status} ${reply.statusText}`.trim() + ".";
  try {
    return refusal(JSON.parse(await reply.text()).error, status);
  } catch {
    return new Refusal(status);
  }
}

function refusal(error, otherwise) {
  const text = typeof error === "string" ? error : error?.message;
  return new Refusal(typeof text === "string" && text.trim() ? text : otherwise, error?.code ?? null);
}
