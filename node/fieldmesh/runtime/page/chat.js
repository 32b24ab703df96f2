// The conversation: asks, shows the answer as it comes, stops it, and says who answered and why. It is kept in this
// page and nowhere else.

import { find, make, replace, say } from "./dom.js";

const FENCE = "```";

export function chat(nameOf) {
  const log = find("log");
  const turns = find("turns");
  const form = find("ask");
  const question = find("question");
  const target = find("target");
  let messages = [];
  let running = null;

  function send(asked) {
    if (running || !asked.trim()) return;
    find("welcome").hidden = true;
    find("new").hidden = false;
    turns.appendChild(make("li", { class: "asked" }, make("span", { class: "unseen" }, "You asked: "), asked));
    const turn = answerBox();
    turns.appendChild(turn.box);
    log.scrollTop = log.scrollHeight;
    question.value = "";
    busy(true);
    const sent = messages.concat([{ role: "user", content: asked }]);
    running = new AbortController();
    answer(turn, sent, target.value, running)
      .then((said) => {
        if (said) messages = sent.concat([{ role: "assistant", content: said }]);
      })
      .then(() => {
        running = null;
        busy(false);
      });
  }

  function busy(is) {
    const stop = find("stop");
    const held = is ? find("send") : stop;
    const focused = document.activeElement === held;
    find("send").hidden = is;
    stop.hidden = !is;
    find("new").disabled = is;
    if (focused) question.focus();
  }

  // Resolves to what was said, empty where nothing was; never rejects.
  async function answer(turn, sent, model, control) {
    const times = { sent: performance.now(), first: 0, last: 0 };
    const told = { text: "", thought: "", tokens: 0, by: "", profile: "", attempts: 1, id: "", why: "" };
    const painting = painter(turn, told);
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST",
        headers: { "content-type": "application/json", "x-fieldmesh-explain": "1" },
        body: JSON.stringify({
          model: model, messages: sent, stream: true, stream_options: { include_usage: true },
        }),
        signal: control.signal,
      });
      told.id = response.headers.get("x-request-id") || "";
      if (!response.ok) throw new Error(await sentence(response));
      told.by = response.headers.get("x-fieldmesh-served-by") || "";
      told.profile = response.headers.get("x-fieldmesh-profile") || "";
      told.attempts = Number(response.headers.get("x-fieldmesh-attempts") || 1);
      say(find("spoken"), told.by + " is answering");
      await events(response.body.getReader(), (event) => {
        if (event.error) throw new Error(event.error.message);
        if (event.usage) told.tokens = event.usage.completion_tokens;
        const delta = event.choices.length ? event.choices[0].delta : {};
        if (!delta.content && !delta.reasoning_content) return;
        times.last = performance.now();
        times.first = times.first || times.last;
        told.text += delta.content || "";
        told.thought += delta.reasoning_content || "";
        painting.soon();
      });
      say(find("spoken"), told.by + " answered: " + told.text);
    } catch (error) {
      const stopped = error.name === "AbortError";
      told.why = stopped ? "Stopped." : error instanceof TypeError ? unreachable() : error.message;
      turn.problem.className = stopped ? "problem stopped" : "problem";
      say(turn.problem, told.why);
      say(find("spoken"), told.why);
    }
    painting.now();
    turn.box.removeAttribute("data-running");
    say(turn.meta, facts(told, times));
    if (told.id) reasons(turn, told).then(follow); // the next question need not wait for them
    follow();
    return told.text;
  }

  function unreachable() {
    return "The node did not answer, or the connection to it broke. The banner says which others there are.";
  }

  function painter(turn, told) {
    let asked = 0;
    function now() {
      asked = 0;
      const below = atEnd();
      turn.thinking.hidden = !told.thought;
      say(turn.thought, told.thought);
      replace(turn.text, pieces(told.text));
      if (told.by && turn.box.hasAttribute("data-running")) say(turn.meta, told.by + " is answering …");
      if (below) log.scrollTop = log.scrollHeight;
    }
    return {
      now: () => {
        cancelAnimationFrame(asked);
        now();
      },
      soon: () => {
        asked = asked || requestAnimationFrame(now);
      },
    };
  }

  function atEnd() {
    return log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  }

  function follow() {
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
  }

  async function reasons(turn, told) {
    try {
      const response = await fetch("mesh/requests/" + encodeURIComponent(told.id), { cache: "no-store" });
      if (!response.ok) return;
      const why = await response.json();
      if (!why.candidates.length) return;
      say(turn.why.firstChild, told.by ? "Why " + told.by + "?" : "Who was asked?");
      replace(turn.why.lastChild, explained(why, nameOf));
      turn.why.hidden = false;
    } catch (error) {
      turn.why.hidden = true; // the node has gone, or has forgotten: there is nothing to tell
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(question.value);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(question.value);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
  find("stop").addEventListener("click", () => running && running.abort());
  find("new").addEventListener("click", () => {
    messages = [];
    replace(turns, []);
    find("welcome").hidden = false;
    find("new").hidden = true;
    question.focus();
  });
  Array.prototype.forEach.call(find("samples").children, (sample) => {
    sample.addEventListener("click", () => {
      question.focus();
      send(sample.textContent);
    });
  });
}

// The list of names in `model`, kept as it was chosen.
export function targets(models) {
  const target = find("target");
  const known = Array.prototype.map.call(target.options, (option) => option.value);
  if (known.join("\n") === models.join("\n")) return;
  const chosen = target.value;
  replace(
    target,
    models.map((name) => make("option", { value: name }, name === "auto" ? "auto: the mesh chooses" : name)),
  );
  target.value = models.indexOf(chosen) < 0 ? "auto" : chosen;
}

function answerBox() {
  const thought = make("div", {});
  const thinking = make("details", { class: "thinking", hidden: true }, make("summary", {}, "Thinking"), thought);
  const said = make("div", { class: "said" });
  const problem = make("p", { class: "problem" });
  const meta = make("p", { class: "meta" }, "asking …");
  const why = make("details", { class: "why", hidden: true }, make("summary", {}, "Why?"), make("div", {}));
  const box = make("li", { class: "answered", "data-running": true }, thinking, said, problem, meta, why);
  return { box: box, thinking: thinking, thought: thought, text: said, problem: problem, meta: meta, why: why };
}

// The events of a stream, each given to `take` as it comes.
async function events(reader, take) {
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const part = await reader.read();
      if (part.done) return;
      const lines = (rest + decoder.decode(part.value, { stream: true })).split("\n");
      rest = lines.pop();
      lines.forEach((line) => {
        if (line.startsWith("data: ") && line !== "data: [DONE]") take(JSON.parse(line.slice(6)));
      });
    }
  } finally {
    reader.cancel().catch(() => null);
  }
}

async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch (error) {
    return "The node answered with status " + response.status + ".";
  }
}

// Text as paragraphs and blocks of code.
function pieces(said) {
  return said.split(FENCE).map((part, index) => {
    if (index % 2 === 0) return make("span", {}, ...words(part.replace(index ? /^\n+|\n+$/g : /\n+$/, "")));
    const line = part.indexOf("\n");
    const code = line < 0 ? "" : part.slice(line + 1).replace(/\n$/, "");
    return make("pre", {}, make("code", {}, code));
  });
}

function words(part) {
  return part.split(/`([^`\n]+)`/).map((piece, index) => (index % 2 ? make("code", {}, piece) : piece));
}

function facts(told, times) {
  const found = [];
  if (told.by) found.push("answered by " + told.by + (told.profile === told.by ? "" : " (" + told.profile + ")"));
  if (times.first) found.push("first token after " + seconds(times.first - times.sent));
  const rate = told.tokens > 1 ? ((told.tokens - 1) * 1000) / (times.last - times.first) : 0;
  if (isFinite(rate) && rate > 0) found.push(rate.toFixed(0) + " tokens/s");
  if (told.tokens) found.push(told.tokens + (told.tokens === 1 ? " token" : " tokens"));
  if (told.attempts > 1) found.push(told.attempts + " attempts");
  return found.join(" · ");
}

function seconds(milliseconds) {
  return (milliseconds / 1000).toFixed(milliseconds < 10000 ? 2 : 0) + " s";
}

function explained(why, nameOf) {
  const lines = [];
  if (why.classified_domain) {
    const sure = Math.round(why.classified_confidence * 100) + " % sure";
    lines.push("By its words the question is about " + why.classified_domain + " (" + sure + ").");
  } else if (why.domain) {
    lines.push("The question is about " + why.domain + ".");
  } else if (why.candidates.length > 1) {
    lines.push("No domain was asked for, and its words point at none.");
  }
  if (why.fallback) lines.push("Nobody of that domain could answer: a generalist did.");
  lines.push("Nodes were compared by " + why.policy + ", the best first:");
  const notes = why.candidates.map((note) =>
    make(
      "li",
      { class: note.eligible ? "" : "out" },
      make("b", {}, note.name),
      note.profile === note.name ? "" : " with " + note.profile,
      ": " + note.reason,
    ),
  );
  const found = [make("p", {}, lines.join(" ")), make("ol", {}, ...notes)];
  if (why.attempts.length > 1) {
    const tries = why.attempts.map((attempt) => (attempt.name || nameOf(attempt.node)) + ": " + attempt.reason);
    found.push(make("p", {}, "Attempts: " + tries.join(", ") + "."));
  }
  return found;
}
