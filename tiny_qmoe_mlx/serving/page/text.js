// Text of a message: lines as they are, fenced code in blocks. Nothing is read as HTML.
"use strict";

const FENCE = /^\s*(`{3,}|~{3,}(?!~))\s*([^`\s]*)(?:\s[^`]*)?$/; // one way to match any line: a long one takes no time

/** Split text at code fences -> [{ code: language or null, text }]; an open fence reaches to the end. */
function blocks(text) {
  const found = [];
  let code = null, fence = "", held = [];
  const close = () => {
    const body = held.join("\n");
    if (code !== null || body.trim()) found.push({ code, text: code === null ? body.replace(/^\n+|\n+$/g, "") : body });
    held = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line);
    if (mark && code === null) {
      close();
      [code, fence] = [mark[2], mark[1]];
    } else if (mark && !mark[2] && mark[1].startsWith(fence)) {
      close();
      code = null;
    } else held.push(line);
  }
  close();
  return found;
}

function codeBlock(language) {
  const code = make("code"), copy = button("Copy", () => copyText(code.textContent, copy));
  const pre = make("pre", "", code);
  pre.tabIndex = 0; // so that the keyboard can scroll it
  return make("div", "code", make("div", "code-head", make("span", "", language || "code"), copy), pre);
}

/** Bring the blocks of an element up to the text; while text grows, only its last block changes. */
function render(element, text) {
  const wanted = blocks(text);
  wanted.forEach(({ code, text: body }, i) => {
    const kind = code === null ? "text" : `code:${code}`;
    let block = element.children[i];
    if (block?.dataset.kind !== kind) {
      const fresh = code === null ? make("p") : codeBlock(code);
      fresh.dataset.kind = kind;
      if (block) block.replaceWith(fresh);
      else element.append(fresh);
      block = fresh;
    }
    const target = code === null ? block : block.querySelector("code");
    if (target.textContent !== body) target.textContent = body;
  });
  while (element.children.length > wanted.length) element.lastChild.remove();
}

async function copyText(text, from) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed, or no secure origin: the old way
    const area = make("textarea", "unseen");
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    from.focus();
  }
  from.textContent = done ? "Copied" : "Not copied";
  announce(from.textContent);
  setTimeout(() => (from.textContent = "Copy"), 1500);
}

function announce(text) {
  byId("announce").textContent = text;
}
