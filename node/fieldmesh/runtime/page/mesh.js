// The mesh in words and numbers: what is agreed on, which requests go where, what happened, and all nodes in a table.

import { find, make, replace, say } from "./dom.js";
import { answers, condition, drawing, role } from "./drawing.js";

const EVENTS_MAX = 8;
const REQUESTS_SHOWN = 8;
const CHANGED = {
  alive: "answers again",
  suspect: "is silent; others are asked about it",
  unreachable: "is heard by others, but not by this node",
  dead: "was found dead",
  left: "said goodbye",
};

export function mesh() {
  const picture = drawing(find("drawing"));
  let before = null;

  return function show(state) {
    const nodes = state.nodes;
    const ids = Object.keys(nodes).sort((a, b) => (nodes[a].name < nodes[b].name ? -1 : 1));
    const alive = ids.filter((id) => nodes[id].state === "alive").length;
    say(find("alive"), alive + " of " + ids.length + (ids.length === 1 ? " node" : " nodes") + " alive");
    picture(state);
    if (!before || before.log !== state.log || before.nodes !== nodes) agreed(state);
    if (!before || before.requests !== state.requests) requests(state);
    table(state, ids);
    if (before) happened(before, state);
    before = state;
  };
}

export function nameIn(state, id) {
  return state && state.nodes[id] ? state.nodes[id].name : (id || "").slice(0, 8);
}

function agreed(state) {
  const log = state.log;
  const voters = log.members.filter((member) => member.voter);
  const learners = log.members.length - voters.length;
  const named = (member) => (member.name || member.id.slice(0, 8)) + (member.here ? "" : " (away)");
  const facts =
    log.role === "none"
      ? [["Log", "none yet: start one node with --found, once"]]
      : [
          ["Leader", log.leader ? log.leader.name || log.leader.id.slice(0, 8) : "none known"],
          ["Term", String(log.term)],
          ["Voters", voters.map(named).join(", ") + (learners ? "; " + learners + " learning" : "")],
          ["Revision", String(log.revision)],
          ["Behind", behind(log)],
          ["This node", log.stopped ? "stopped: " + log.stopped : log.role],
        ];
  const shown = facts.map((fact) => fact.join("\n")).join("\n\n");
  const list = find("agreed");
  if (list.getAttribute("data-shown") === shown) return;
  list.setAttribute("data-shown", shown);
  replace(list, facts.map((fact) => make("div", {}, make("dt", {}, fact[0]), make("dd", {}, fact[1]))));
}

function behind(log) {
  const entries = log.lag_entries ? log.lag_entries + " entries" : "nothing";
  if (log.stale_s === null) return entries + ", of unknown age";
  return log.stale_s ? entries + ", " + log.stale_s + " s old" : entries;
}

function requests(state) {
  const list = find("requests");
  const shown = state.requests.slice(0, REQUESTS_SHOWN).map((request) => {
    const serving = request.serving ? nameIn(state, request.serving) : "nobody yet";
    return make(
      "li",
      { class: request.state },
      make("b", {}, nameIn(state, request.entry) + " → " + serving),
      make("span", {}, [request.domain, outcome(request)].filter(Boolean).join(" · ")),
    );
  });
  replace(list, shown.length ? shown : [make("li", {}, "none yet")]);
}

function outcome(request) {
  const tokens = request.tokens + (request.tokens === 1 ? " token" : " tokens");
  const again = request.attempts > 1 ? ", " + request.attempts + " attempts" : "";
  if (request.state === "waiting") return "waits for a node" + again;
  if (request.state === "running") return request.tokens ? "answers, " + tokens + " so far" : "is asked" + again;
  if (request.state === "done") return tokens + " in " + request.duration_s.toFixed(1) + " s" + again;
  return (request.code === "CANCELLED" ? "stopped by its asker" : "failed: " + request.code) + ", " + tokens;
}

function table(state, ids) {
  const body = find("nodes");
  const rows = ids.map((id) => cells(state, id));
  const shown = JSON.stringify(rows);
  if (body.getAttribute("data-shown") === shown) return;
  body.setAttribute("data-shown", shown);
  const focused = document.activeElement && body.contains(document.activeElement) && document.activeElement.href;
  replace(
    body,
    rows.map((row) => {
      const link = row.page ? make("a", { href: row.page, target: "_blank", rel: "noopener" }, "open") : "–";
      if (focused && row.page === focused) setTimeout(() => link.focus(), 0);
      const rest = row.cells.map((cell) => make("td", {}, cell));
      return make("tr", { class: row.state }, make("th", { scope: "row" }, row.name), ...rest, make("td", {}, link));
    }),
  );
}

function cells(state, id) {
  const node = state.nodes[id];
  const local = id === state.local;
  const names = (of) => node.profiles.map(of).filter(Boolean).join(", ") || "–";
  const part = role(state, id);
  const there = answers(node);
  return {
    name: node.name + (local ? " (this node)" : ""),
    state: node.state,
    page: local || !there ? "" : reachable(node)[0] || "",
    cells: [
      condition(node) + (part ? ", " + part : ""),
      names((profile) => profile.name),
      names((profile) => profile.domains.join(", ")),
      there ? node.running + "/" + node.slots : "–",
      there ? node.queued + "/" + node.queue_max : "–",
      there ? Math.round(node.kv_pressure * 100) + " %" : "–",
      there && node.decode_tokens_per_s ? String(node.decode_tokens_per_s) : "–",
      there && !local && node.rtt_ms ? node.rtt_ms.toFixed(1) + " ms" : "–",
    ],
  };
}

// Where a node's page can be opened from here: a loopback address is of use to its own box alone.
export function reachable(node) {
  const here = isLoopback(location.hostname);
  return node.pages.filter((page) => here || !isLoopback(new URL(page).hostname));
}

function isLoopback(host) {
  return host === "localhost" || host === "[::1]" || host.indexOf("127.") === 0;
}

function happened(before, state) {
  Object.keys(state.nodes).forEach((id) => {
    const node = state.nodes[id];
    const old = before.nodes[id];
    if (!old) tell(node.name + " has joined", "alive");
    else if (old.state !== node.state) tell(node.name + " " + CHANGED[node.state], node.state);
    else if (node.state === "alive" && old.engine !== node.engine) {
      tell("the engine of " + node.name + " is " + node.engine, node.engine === "ready" ? "alive" : "suspect");
    }
  });
  const leader = state.log.leader;
  if (leader && (!before.log.leader || before.log.leader.id !== leader.id)) {
    tell((leader.name || leader.id.slice(0, 8)) + " leads the log, term " + state.log.term, "alive");
  }
  if (!leader && before.log.leader) tell("no leader of the log is known", "suspect");
  if (before.log.revision !== state.log.revision) {
    tell("the configuration is at revision " + state.log.revision, "alive");
  }
}

export function tell(words, kind) {
  const list = find("events");
  const now = new Date().toTimeString().slice(0, 8);
  list.insertBefore(make("li", { class: kind }, make("time", {}, now), " " + words), list.firstChild);
  while (list.children.length > EVENTS_MAX) list.removeChild(list.lastChild);
}
