// The chat: what is asked, how an answer is read, and what a person is told when there is none.
"use strict";

const JSON_TYPE = { "Content-Type": "application/json" };
const DEFAULTS = { system: "", max_tokens: null, temperature: 0.7 }; // null: as many as the server gives
const ENDED = "The connection ended before the answer did.";
const FULL = "Begin a new chat, or ask for fewer tokens in Settings.";
const TRIES = 5; // of a request that the server is too busy for
const chat = { messages: [], running: null, recalled: 0 };

const settings = () => ({ ...DEFAULTS, ...kept("localStorage", "settings", {}) });

function nearEnd() {
  const log = byId("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function toEnd() {
  byId("log").scrollTop = byId("log").scrollHeight;
}

/** Add to the conversation's picture; the view stays at its end where it was there. */
function follow(change) {
  const atEnd = nearEnd();
  change();
  if (atEnd) toEnd();
  byId("latest").hidden = nearEnd();
}

function showMessage(message) {
  const body = make("div", "body");
  const article = make("article", message.role, make("h3", "unseen", message.role === "user" ? "You" : "Model"), body);
  byId("messages").append(article);
  byId("empty").hidden = true;
  renderMessage(article, message);
  return article;
}

function renderMessage(article, message) {
  let thought = article.querySelector("details");
  if (message.reasoning && !thought) {
    thought = make("details", "", make("summary", "", "Reasoning"), make("p"));
    article.querySelector(".body").before(thought);
  }
  if (thought) thought.lastChild.textContent = message.reasoning;
  if (message.role === "user") article.querySelector(".body").textContent = message.content;
  else render(article.querySelector(".body"), message.content);
}

/** The line below a whole answer: figures and the copy button. */
function finishMessage(article, message) {
  const copy = button("Copy", () => copyText(message.content, copy));
  copy.setAttribute("aria-label", "Copy the answer");
  article.append(make("footer", "muted", make("span", "", message.note), copy));
}

/** The messages as the server takes them: the system prompt first, and questions without an answer joined. */
function conversation() {
  const { system } = settings(), sent = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content } of chat.messages) {
    const last = sent.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else if (content) sent.push({ role, content });
  }
  return sent;
}

async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  const broken = (error) => { throw error.name === "AbortError" ? error : new Refusal(ENDED); };
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(broken);
      if (done) break;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      yield* lines;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {}); // an aborted stream is already closed
  }
}

/** Server-sent events of an answer -> parsed chunks, `{ progress: [read, all] }` while the prompt is read. */
async function* chunks(stream) {
  for await (const line of linesOf(stream)) {
    const progress = /^: keepalive (\d+)\/(\d+)/.exec(line);
    if (progress) yield { progress: [Number(progress[1]), Number(progress[2])] };
    if (!line.startsWith("data:")) continue;
    const text = line.slice(5).trim();
    if (text === "[DONE]") return;
    const chunk = JSON.parse(text);
    if (chunk.error) throw refusal(chunk.error, "The server ended the answer with an error.");
    yield chunk;
  }
  throw new Refusal(ENDED);
}

/** Wait in steps of a second, saying how many are left; ends at once with the signal. */
async function countdown(seconds, say, signal) {
  for (let leftOver = seconds; leftOver > 0; leftOver--) {
    say(leftOver);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
    signal.throwIfAborted();
  }
}

/** Seconds that Retry-After asks for, as a number or as a date; null where it is missing. */
function retryAfter(reply) {
  const value = reply.headers.get("Retry-After");
  if (value === null) return null;
  const seconds = /^\d+$/.test(value.trim()) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(300, Math.max(1, Math.ceil(seconds))) : null;
}

/** Ask for an answer; while the server is busy and says until when, wait and ask again. */
async function openAnswer(signal) {
  const { max_tokens, temperature } = settings();
  const body = JSON.stringify({ ...(poll.model ? { model: poll.model } : {}), messages: conversation(), stream: true,
    stream_options: { include_usage: true }, temperature, ...(max_tokens ? { max_tokens } : {}) });
  for (let tries = 1; ; tries++) {
    const reply = await request("v1/chat/completions", { method: "POST", headers: JSON_TYPE, body, signal });
    if (reply.ok) return reply;
    const refused = await refusalOf(reply), wait = [429, 503].includes(reply.status) ? retryAfter(reply) : null;
    if (wait === null || tries === TRIES) throw refused;
    const seconds = make("span");
    seconds.setAttribute("aria-hidden", "true"); // the alert is read once, not every second
    showProblem(refused.message, make("p", "", "Trying again", seconds, "."));
    await countdown(wait, (n) => (seconds.textContent = ` in ${n} s`), signal);
    clearProblem();
  }
}

/** Read an answer into its message; returns times in ms and what ended it. */
async function readAnswer(reply, message, changed) {
  const seen = { first: 0, last: 0, tokens: null, reason: null };
  for await (const chunk of chunks(reply.body)) {
    const [read, all] = chunk.progress ?? [];
    if (all) showWaiting(`Reading the prompt, ${number(read)} of ${number(all)} tokens`);
    seen.tokens = chunk.usage?.completion_tokens ?? seen.tokens;
    const choice = chunk.choices?.[0], delta = choice?.delta ?? {};
    seen.reason = choice?.finish_reason ?? seen.reason;
    const thought = delta.reasoning ?? delta.reasoning_content ?? "";
    if (!delta.content && !thought) continue;
    seen.last = performance.now();
    seen.first ||= seen.last;
    message.content += delta.content ?? "";
    message.reasoning += thought;
    changed();
  }
  return seen;
}

/** "42 tokens · 12.1 tokens/s · first after 0.4 s", as far as it is known. */
function noteOf({ first, last, tokens, reason }, began) {
  const parts = [];
  if (tokens !== null) parts.push(`${number(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
  if (tokens > 1 && last > first) parts.push(`${rate((1000 * (tokens - 1)) / (last - first))} tokens/s`);
  if (first) parts.push(`first after ${number((first - began) / 1000, 1)} s`);
  if (reason === "length") parts.push("ended at the limit of tokens, see Settings");
  return parts.join(" · ") || "Nothing was written";
}

function showProblem(text, ...more) {
  clearProblem();
  const box = make("div", "problem", make("p", "", text), ...more);
  box.setAttribute("role", "alert");
  follow(() => byId("messages").append(box));
}

function clearProblem() {
  document.querySelector(".problem")?.remove();
}

function showWaiting(text) {
  document.querySelector(".waiting")?.remove();
  if (text) follow(() => byId("messages").append(make("p", "waiting muted", text)));
}

function showRunning(running) {
  const focused = document.activeElement === byId(running ? "send" : "stop");
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  if (focused) byId("prompt").focus();
}

/** What went wrong with an answer, and what can be done about it. */
function fail(error, stopped) {
  clearProblem();
  if (stopped) return announce("Stopped");
  const text = error instanceof Refusal ? error.message : `The server's answer cannot be read: ${error.message}`;
  const row = make("div", "row", button("Try again", tryAgain));
  const full = error.code === "context_length_exceeded";
  if (full || chat.messages.length > 1) row.append(button("New chat", newChat));
  showProblem(text, ...(full ? [make("p", "", FULL)] : []), row);
}

/** Ask the last question once more; what there was of its answer goes. */
function tryAgain() {
  if (chat.messages.at(-1)?.role === "assistant") {
    chat.messages.pop();
    byId("messages").querySelector("article:last-of-type").remove();
  }
  byId("prompt").focus();
  answer();
}

/** Ask the server for the answer to the last question, and show it as it comes. */
async function answer() {
  if (chat.running) return;
  const control = (chat.running = new AbortController());
  const message = { role: "assistant", content: "", reasoning: "", note: "" };
  const began = performance.now();
  let article = null, frame = 0;
  const draw = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    showWaiting("");
    follow(() => {
      article ??= showMessage(message);
      article.setAttribute("aria-busy", "true");
      renderMessage(article, message);
    });
  };
  clearProblem();
  showRunning(true);
  showWaiting("Waiting for the first token");
  toEnd();
  announce("The model is answering");
  pollOn();
  try {
    const reply = await openAnswer(control.signal);
    message.note = noteOf(await readAnswer(reply, message, () => (frame ||= requestAnimationFrame(draw))), began);
    draw();
    announce(message.content.slice(0, 2000) || message.note);
  } catch (error) {
    message.note = control.signal.aborted ? "Stopped" : "Not complete";
    if (chat.running === control) {
      if (message.content || message.reasoning) draw();
      fail(error, control.signal.aborted);
    }
  }
  cancelAnimationFrame(frame);
  if (chat.running !== control) return; // a new chat began meanwhile
  chat.running = null;
  showWaiting("");
  showRunning(false);
  pollOn();
  if (!article) return;
  article.removeAttribute("aria-busy");
  follow(() => {
    finishMessage(article, message);
    const problem = document.querySelector(".problem");
    if (problem) byId("messages").append(problem);
  });
  chat.messages.push(message);
  keep("sessionStorage", "messages", chat.messages);
}

function send(text) {
  if (chat.running || !text.trim()) return;
  clearProblem();
  tokenRefused = false;
  const message = { role: "user", content: text.trim() };
  chat.messages.push(message);
  keep("sessionStorage", "messages", chat.messages);
  chat.recalled = 0;
  showMessage(message);
  byId("prompt").value = "";
  growPrompt();
  answer();
}

function stop() {
  chat.running?.abort();
}

function newChat() {
  stop();
  chat.running = null;
  chat.messages = [];
  keep("sessionStorage", "messages", null);
  byId("messages").replaceChildren();
  byId("empty").hidden = false;
  byId("latest").hidden = true;
  showRunning(false);
  byId("prompt").focus();
}

function growPrompt() {
  const prompt = byId("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

/** In an empty box, the arrow up brings back earlier questions. */
function recall(step) {
  const asked = chat.messages.filter((m) => m.role === "user");
  const wanted = Math.max(0, Math.min(asked.length, chat.recalled + step));
  chat.recalled = wanted;
  byId("prompt").value = wanted ? asked.at(-wanted).content : "";
  growPrompt();
}

function promptKey(event) {
  if (event.isComposing) return; // an input method's own Enter
  const prompt = byId("prompt"), recalling = chat.recalled > 0 || prompt.value === "";
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send(prompt.value);
  } else if (recalling && ["ArrowUp", "ArrowDown"].includes(event.key) && !prompt.value.includes("\n")) {
    event.preventDefault();
    recall(event.key === "ArrowUp" ? 1 : -1);
  }
}
