// The voting page. It holds pictures, a prompt and a random token; which model is which it learns after the vote alone.
const find = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];
const VIEWS = ["side", "slider", "flicker", "difference"];
const WORDS = { left: "first is better", right: "second is better", tie: "tie", bad: "both bad", skip: "skipped" };
const KEYS = { "1": "left", arrowleft: "left", "2": "right", arrowright: "right", t: "tie", b: "bad", s: "skip" };
const LONGEST = 15000; // milliseconds for an answer of the server, which has its pictures ready
const stage = find(".stage");
const remember = (name, value) => { try { localStorage.setItem(`mmalign-arena-${name}`, value); } catch { /* private window */ } };
const recall = (name) => { try { return localStorage.getItem(`mmalign-arena-${name}`) || ""; } catch { return ""; } };

let rater = props.named ? null : recall("rater");
let pair = null, last = null, revealed = null, waiting = null;
let busy = false, view = "side", since = 0, alone = false;
let zoom = 1, x = 0, y = 0, cut = 50;

// ------------------------------------------------------------------------------------------------ the server

async function ask(name, more = {}) {
  if (busy) return;
  busy = true;
  element.classList.add("busy");
  const who = rater;
  let reply;
  try { reply = await soon(server[name]({ rater, ...more })); } catch { reply = undefined; }
  busy = false;
  element.classList.remove("busy");
  if (rater !== who) return undefined; // who asked has left
  if (reply === undefined || reply === null) return lost();
  if (reply.error) { say(reply.error); return undefined; }
  say("");
  return reply;
}

function soon(answer) { // a request that got lost on the way must not hold the page for ever
  return Promise.race([answer, new Promise((_, fail) => setTimeout(fail, LONGEST))]);
}

function lost() {
  say("The server does not answer. Every vote that was counted is saved; this page goes on when the server is back.");
  again(2000);
}

function again(milliseconds) {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    if (busy) return again(milliseconds);
    const reply = await ask("next");
    if (reply) show(reply);
  }, milliseconds);
}

function say(text) {
  const alert = find(".alert");
  alert.textContent = text;
  alert.hidden = !text;
}

// ------------------------------------------------------------------------------------------------- one pair

function show(reply) {
  clearTimeout(waiting);
  if (reply.trouble) say(reply.trouble);
  if (reply.drawing) again(1000);
  pair = reply.pair;
  last = reply.last;
  revealed = reply.names ? reply : null;
  find(".door").hidden = true;
  find(".room").hidden = false;
  find(".over").hidden = Boolean(pair) || reply.drawing;
  find(".drawing").hidden = !reply.drawing;
  for (const selector of [".stage", ".prompt", ".views"]) find(selector).hidden = !pair;
  find(".asked").hidden = !pair || !pair.media;
  find(".answers").hidden = !pair || Boolean(revealed);
  find(".next").hidden = !revealed;
  find(".strip [data-answer=skip]").hidden = !pair || Boolean(revealed);
  find(".count").textContent = `${reply.done} of ${reply.total}`;
  find(".progress").title = `You: ${reply.done} of ${reply.total} pairs. Everybody together: ${reply.covered}.`;
  find(".fill").style.width = `${(100 * reply.done) / Math.max(1, reply.total)}%`;
  find(".last").textContent = last ? `Last: ${WORDS[last.answer]}` : "";
  find("[data-act=undo]").disabled = !last || last.revealed;
  find("[data-act=undo]").title = last && last.revealed ? "its models have been revealed: the vote stands" : "take the last vote back";
  find("[data-act=reveal]").disabled = !last || Boolean(revealed);
  element.dataset.token = pair ? pair.token : "";
  element.dataset.mode = revealed ? "revealed" : pair ? "voting" : reply.drawing ? "drawing" : "over";
  if (!pair) return;
  find(".prompt").textContent = pair.prompt;
  if (pair.media) find(".asked img").src = pair.media;
  for (const side of ["left", "right"]) {
    const pane = find(`.pane.${side}`), picture = pane.querySelector("img"), text = pane.querySelector(".text");
    const named = revealed ? revealed.names[side] : null;
    pane.querySelector(".name").textContent = named ? named.name : "";
    pane.querySelector(".name").title = named ? named.model : "";
    pane.classList.toggle("chosen", Boolean(revealed) && revealed.answer === side);
    picture.hidden = !("image" in pair[side]);
    text.hidden = !picture.hidden;
    if (!picture.hidden) picture.src = pair[side].image;
  }
  element.classList.toggle("texts", "text" in pair.left);
  for (const name of ["slider", "flicker"]) find(`[data-view=${name}]`).hidden = "text" in pair.left;
  if ("text" in pair.left && view !== "difference") look("side"); else look(view);
  reset();
  fit();
  since = performance.now();
}

function fit() {
  const [left, right] = all(".window img");
  const size = () => {
    if (left.hidden || !left.naturalWidth || !right.naturalWidth) return;
    stage.style.setProperty("--ratio", Math.max(left.naturalWidth / left.naturalHeight, right.naturalWidth / right.naturalHeight));
    stage.classList.toggle("pixels", Math.max(left.naturalWidth, right.naturalWidth) <= 128);
  };
  left.onload = right.onload = size;
  size();
}

async function vote(answer) {
  if (!pair || revealed) return;
  const milliseconds = Math.round(performance.now() - since);
  const token = pair.token, chosen = find(`.pane.${answer}`);
  if (chosen) chosen.classList.add("flash");
  const reply = await ask("vote", { token, answer, milliseconds });
  all(".pane").forEach((pane) => pane.classList.remove("flash"));
  if (!reply) return;
  if (find(".always input").checked && answer !== "skip") {
    last = reply.last;
    return act("reveal");
  }
  show(reply);
}

async function act(name) {
  if (name === "leave") { remember("rater", ""); rater = ""; return door(); }
  if (name === "zoom") return reset();
  if (name === "undo" || name === "reveal") {
    if (!last || (name === "undo" && last.revealed)) return;
    const reply = await ask(name, { token: last.token });
    if (reply) show(reply);
  }
  if (name === "next") { const reply = await ask("next"); if (reply) show(reply); }
}

// ------------------------------------------------------------------------------------------------- the views

function look(name) {
  view = name;
  stage.dataset.view = name;
  all(".views [data-view]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.view === name)));
  find(".edge").hidden = name !== "slider";
  if (pair && "text" in pair.left) words(name === "difference");
}

function words(marked) {
  const texts = ["left", "right"].map((side) => pair[side].text);
  const parts = texts.map((text) => text.match(/\s+|[^\s]+/g) || []);
  const same = marked ? common(parts[0], parts[1]) : [new Set(), new Set()];
  ["left", "right"].forEach((side, number) => {
    const box = find(`.pane.${side} .text`);
    box.textContent = "";
    if (!marked) { box.textContent = texts[number]; return; }
    parts[number].forEach((part, index) => {
      const own = part.trim() && !same[number].has(index);
      const piece = own ? document.createElement("mark") : document.createTextNode(part);
      if (own) piece.textContent = part;
      box.append(piece);
    });
  });
}

function common(first, second) {
  // Longest common subsequence of words; very long answers are compared by which words they have.
  if (first.length * second.length > 4e6) {
    const [a, b] = [new Set(first), new Set(second)];
    const pick = (parts, other) => new Set(parts.flatMap((part, index) => (other.has(part) ? [index] : [])));
    return [pick(first, b), pick(second, a)];
  }
  const width = second.length + 1, table = new Uint32Array((first.length + 1) * width);
  for (let i = first.length - 1; i >= 0; i--)
    for (let j = second.length - 1; j >= 0; j--)
      table[i * width + j] = first[i] === second[j] ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  const found = [new Set(), new Set()];
  for (let i = 0, j = 0; i < first.length && j < second.length;) {
    if (first[i] === second[j]) { found[0].add(i++); found[1].add(j++); }
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
    else j++;
  }
  return found;
}

setInterval(() => { if (view === "flicker" && !document.hidden) { alone = !alone; stage.classList.toggle("second", alone); } }, 600);

function place() {
  x = Math.min(0, Math.max(100 * (1 - zoom), x));
  y = Math.min(0, Math.max(100 * (1 - zoom), y));
  stage.style.setProperty("--zoom", zoom);
  stage.style.setProperty("--x", `${x}%`);
  stage.style.setProperty("--y", `${y}%`);
  const button = find(".zoom");
  button.hidden = zoom === 1;
  button.textContent = `${Math.round(100 * zoom)} % ×`;
}
function reset() { zoom = 1; x = y = 0; place(); }
function zoomAt(event, factor) {
  const box = event.target.closest(".window")?.getBoundingClientRect();
  if (!box) return;
  const next = Math.min(16, Math.max(1, zoom * factor));
  const px = (100 * (event.clientX - box.left)) / box.width, py = (100 * (event.clientY - box.top)) / box.height;
  x = px - ((px - x) * next) / zoom;
  y = py - ((py - y) * next) / zoom;
  zoom = next;
  place();
}
stage.addEventListener("wheel", (event) => {
  if (element.classList.contains("texts") || !event.target.closest(".window")) return;
  event.preventDefault();
  zoomAt(event, Math.exp(-event.deltaY / 400));
}, { passive: false });
stage.addEventListener("dblclick", (event) => (zoom > 1 ? reset() : zoomAt(event, 3)));

const fingers = new Map();
let sliding = false;
stage.addEventListener("pointerdown", (event) => {
  const box = event.target.closest(".window")?.getBoundingClientRect();
  if (!box || element.classList.contains("texts")) return;
  sliding = view === "slider" && (zoom === 1 || Math.abs(event.clientX - box.left - (cut / 100) * box.width) < 24);
  fingers.set(event.pointerId, event);
  stage.setPointerCapture(event.pointerId);
  if (sliding) slide(event);
});
stage.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  fingers.set(event.pointerId, event);
  if (sliding) return slide(event);
  const box = find(".window").getBoundingClientRect();
  if (fingers.size === 2) {
    const [other] = [...fingers.entries()].filter(([id]) => id !== event.pointerId).map(([, finger]) => finger);
    const apart = (finger) => Math.hypot(finger.clientX - other.clientX, finger.clientY - other.clientY) || 1;
    zoomAt({ target: find(".window img"), clientX: other.clientX, clientY: other.clientY }, apart(event) / apart(before));
    return;
  }
  x += (100 * (event.clientX - before.clientX)) / box.width;
  y += (100 * (event.clientY - before.clientY)) / box.height;
  place();
});
for (const ending of ["pointerup", "pointercancel"])
  stage.addEventListener(ending, (event) => { fingers.delete(event.pointerId); sliding = false; });
function slide(event) {
  const box = find(".pane.right .window").getBoundingClientRect();
  cut = Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width));
  stage.style.setProperty("--cut", `${cut}%`);
}

// ------------------------------------------------------------------------------------------- keys and clicks

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || button.disabled) return;
  if (button.dataset.answer) vote(button.dataset.answer);
  if (button.dataset.view) look(button.dataset.view);
  if (button.dataset.act) act(button.dataset.act);
  if (button.type !== "submit") button.blur(); // so that the space bar does not press it again
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest && event.target.closest("input:not([type=checkbox]), textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (!element.isConnected || !find(".room").offsetParent) return; // another tab, or the door
  const key = event.key.toLowerCase();
  if (key === " " || key === "enter") {
    if (event.target.closest && event.target.closest("button, label, input")) return;
    if (revealed) act("next"); else return;
  } else if (KEYS[key]) vote(KEYS[key]);
  else if (key === "u") act("undo");
  else if (key === "r") act("reveal");
  else if (key === "0") reset();
  else if (key === "v") {
    const views = pair && "text" in pair.left ? ["side", "difference"] : VIEWS;
    look(views[(views.indexOf(view) + 1) % views.length]);
  } else return;
  event.preventDefault();
});
find(".always input").checked = recall("always") === "yes";
find(".always input").addEventListener("change", (event) => {
  remember("always", event.target.checked ? "yes" : "");
  event.target.blur(); // the space bar goes on to the next pair, it does not switch this off again
});
find(".enter").addEventListener("submit", (event) => { event.preventDefault(); enter(find("[name=rater]").value.trim()); });

async function enter(name) {
  rater = props.named ? null : name;
  const reply = await ask("next");
  if (!reply) { find(".room").hidden = false; return; }
  if (!props.named) remember("rater", name);
  find(".who span").textContent = `Voting as ${reply.rater}.`;
  find(".who button").hidden = props.named;
  find("[name=rater]").blur(); // it is hidden now, and keys that it still got until the next frame would be no votes
  show(reply);
}
function door() {
  clearTimeout(waiting);
  find(".room").hidden = true;
  find(".door").hidden = false;
  find("[name=rater]").value = "";
  find("[name=rater]").focus();
}
if (props.named || rater) enter(rater); else door();
