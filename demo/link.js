// What was asked for, in the address: behind its #, which no browser sends to a server. So Back shows the
// text before, a reload shows the same one again, and a link restores it. Gradio calls this when the
// page opens; the events of the page (demo/asking.py) call the functions of `demo` at the end.
//
// #compare=… has the tab, and the values of its fields as JSON, deflated, in base64url; #logits has the
// tab alone, and nothing stands for the page as it opens.

const { fields, models, opening, most_bytes: mostBytes } = props;
const [notice, said] = element.querySelectorAll("p");

async function packed(values) {
  const bytes = new TextEncoder().encode(JSON.stringify(values));
  if (bytes.length > mostBytes) throw new RangeError("too much for a link");
  const deflated = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate-raw"));
  const characters = Array.from(
    new Uint8Array(await new Response(deflated).arrayBuffer()),
    (byte) => String.fromCharCode(byte),
  );
  return btoa(characters.join("")).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

async function unpacked(text) {
  if (text.length > 2 * mostBytes) throw new RangeError("too much for a link");
  const characters = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = Uint8Array.from(characters, (character) => character.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let json = "";
  let size = 0;
  for (const reader = inflated.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return JSON.parse(json + decoder.decode());
    size += value.length; // a few bytes may become gigabytes
    if (size > mostBytes) {
      reader.cancel();
      throw new RangeError("too much for a link");
    }
    json += decoder.decode(value, { stream: true });
  }
}

// subtle: a page may have a <base>, so that a fragment alone would lose what stands behind the ?.
async function addressOf({ tab, values }) {
  const fragment = fields[tab].length ? `#${tab}=${await packed(values)}` : `#${tab}`;
  return new URL(fragment, location.href).href;
}

// The state that an address stands for; null where it cannot be read.
async function stateOf(fragment) {
  if (fragment.length < 2) return opening;
  const [, tab, rest] = fragment.match(/^#([a-z]+)(?:=(.*))?$/) ?? [];
  if (!Object.hasOwn(fields, tab ?? "")) return null;
  try {
    const found = fields[tab].length ? await unpacked(rest) : {};
    const values = Object.fromEntries(fields[tab].map((name) => [name, found[name]]));
    return Object.values(values).every((value) => typeof value === "string")
      ? { tab, values }
      : null;
  } catch {
    return null;
  }
}

const isUnlisted = (name, value) => name.startsWith("model") && !models.includes(value);
const hasUnlisted = ({ values }) => Object.entries(values).some((field) => isUnlisted(...field));

// What the address stands for now, as JSON, because two browsers deflate the same state differently.
let current = JSON.stringify(opening);
let restored = null; // the state that is on its way into the fields
let turn = 0; // of Back and Forward, which may be pressed faster than a state is restored

async function restore() {
  const mine = ++turn;
  const state = await stateOf(location.hash);
  await demo.stopped();
  if (mine !== turn) return;
  notice.classList.remove("past");
  notice.textContent = !state
    ? "The link could not be read, so it changed nothing here."
    : hasUnlisted(state)
      ? "The link asks for a model that is not on the list. Choose one, and press the button."
      : "";
  restored = state;
  current = JSON.stringify(state);
  if (state) trigger("submit");
  return state;
}

async function open() {
  const state = location.hash.length < 2 ? null : await restore();
  if (!state) current = JSON.stringify(opening);
  if (state?.tab !== opening.tab) trigger("select"); // the example with its score
}

// The scores that run, by their tabs, each with what resolves when it is over, and when the server has
// taken the request: before that there is nothing to stop.
const running = new Map();
const TAKEN_MS = 3000; // at most, until Stop goes on
new PerformanceObserver((list) => {
  if (!list.getEntries().some(({ name }) => name.includes("/queue/join"))) return;
  for (const run of running.values()) run.taken.resolve();
}).observe({ type: "resource" });

const promised = () => {
  let resolve;
  return Object.assign(new Promise((settle) => (resolve = settle)), { resolve });
};
const button = (tab, kind) => document.getElementById(`${tab}-${kind}`);
// In a narrow window Gradio has the last tabs in a menu, where only their names tell them apart.
const tabButton = (tab) =>
  button(tab, "button") ??
  [...document.querySelectorAll(".overflow-dropdown button")].find(
    ({ textContent }) => textContent.trim().toLowerCase() === tab,
  );
const after = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const usable = (interactive) => ({ __type__: "update", interactive });

globalThis.demo = {
  // Score was pressed: keep what it asks for. -> nothing in place of the old result, which would stand
  // there for a new text, and stay after an error; and a button to stop it.
  async ask(tab, values, numOutputs) {
    if (running.has(tab)) return []; // pressed twice
    running.set(tab, { taken: promised(), over: promised() });
    notice.classList.add("past");
    await demo.keep(tab, values);
    return [...Array(numOutputs).fill(null), usable(true)];
  },

  // Puts a state into the address, as a new entry of the history if it is a new state.
  async keep(tab, values) {
    const state = demo.state(tab, values);
    if (JSON.stringify(state) === current) return;
    try {
      history.pushState(null, "", await addressOf(state));
      current = JSON.stringify(state);
    } catch {
      // It is too long for an address, or the browser cannot deflate; a score needs neither.
    }
  },

  state: (tab, values) => ({
    tab,
    values: Object.fromEntries(fields[tab].map((name, i) => [name, values[i] ?? ""])),
  }),

  // A score is there, failed or was stopped.
  done(tab) {
    if (document.activeElement === button(tab, "stop")) button(tab, "score").focus(); // or be lost
    running.get(tab)?.over.resolve();
    running.delete(tab);
    return usable(false);
  },

  // Stop was pressed. -> the sentence in place of a result
  async stop(tab, numOutputs) {
    button(tab, "score").focus();
    await Promise.race([running.get(tab)?.taken, after(TAKEN_MS)]);
    return ["Stopped. Nothing was scored.", ...Array(numOutputs - 1).fill(null)];
  },

  async stopped() {
    for (const [tab, { over }] of running) {
      button(tab, "stop").click();
      await over;
    }
  },

  // -> a value for each field of all tabs, where undefined changes nothing
  restored() {
    const { tab, values } = restored;
    const isKept = (of, name) => of !== tab || isUnlisted(name, values[name]);
    return Object.entries(fields).flatMap(([of, names]) =>
      names.map((name) => (isKept(of, name) ? undefined : values[name])),
    );
  },

  async press() {
    const { tab } = restored;
    tabButton(tab)?.click();
    if (!fields[tab].length || hasUnlisted(restored)) return;
    for (let i = 0; i < 1000 && !button(tab, "score"); i++) {
      await after(20); // until Gradio has made the tab
    }
    button(tab, "score")?.click();
  },

  // Copy link was pressed. -> what the button says for a while
  async copy(tab, values) {
    let told = "Link copied";
    try {
      const address = await addressOf(demo.state(tab, values));
      await navigator.clipboard.writeText(address).catch(() => {
        history.replaceState(null, "", address); // the browser keeps the clipboard to itself
        current = JSON.stringify(demo.state(tab, values));
        told = "In the address";
      });
    } catch {
      told = "Too long to link";
    }
    said.textContent = told;
    return told;
  },

  async copied() {
    await after(2000);
    said.textContent = "";
    return "Copy link";
  },
};

addEventListener("popstate", restore);
open();
