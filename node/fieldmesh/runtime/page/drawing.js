// The mesh as a drawing: one box a node, and lines where requests go. Boxes are made once and then changed, so that
// what moves goes on moving.

import { draw, say } from "./dom.js";

const WIDTH = 164;
const HEIGHT = 96;
const GAP = 20;
const RING_MAX = 8;
const BOXES_MAX = 60;
const WIDE = 560;
const SLOTS_MAX = 10;
const FADING_MS = 1500;

export function drawing(holder) {
  const ways = draw("g", {});
  const flows = draw("g", {});
  const boxes = draw("g", {});
  const svg = draw("svg", { role: "img", "aria-label": "" }, ways, flows, boxes);
  holder.appendChild(svg);
  const drawn = {};
  const ended = {};
  let begun = false;
  let last = null;
  let timer = 0;

  function show(state) {
    last = state;
    const order = ordered(state);
    const width = Math.max(300, holder.clientWidth || 640);
    const plan = places(order.length - 1, width);
    svg.setAttribute("viewBox", "0 0 " + plan.width + " " + plan.height);
    svg.setAttribute("height", plan.height);
    svg.setAttribute("aria-label", label(state, order.length));
    const at = {};
    order.forEach((id, index) => {
      at[id] = plan.at[index];
    });
    keep(boxes, "box", order, (id) => {
      if (!drawn[id]) drawn[id] = box();
      place(drawn[id], state, id, at[id]);
      return drawn[id].group;
    });
    Object.keys(drawn).forEach((id) => {
      if (!at[id]) delete drawn[id];
    });
    const others = order.slice(1);
    keep(ways, "way", others, (id, known) => {
      const line = known || draw("line", {});
      between(line, at[state.local], at[id]);
      line.setAttribute("class", "way " + state.nodes[id].state);
      return line;
    });
    showFlows(state, at);
  }

  // What goes on, and for a moment what has just ended: an answer may take less time than two looks are apart.
  function showFlows(state, at) {
    const now = Date.now();
    const shown = {};
    let fading = false;
    state.requests.forEach((request) => {
      const over = request.state === "done" || request.state === "failed";
      if (over && !ended[request.key]) ended[request.key] = begun ? now : 1;
      if (over && now - ended[request.key] > FADING_MS) return;
      if (!request.serving || !at[request.serving] || !at[request.entry]) return;
      const key = request.entry + request.serving;
      const found = shown[key] || { request: request, going: false, told: false };
      found.going = found.going || !over;
      found.told = found.told || request.tokens > 0;
      shown[key] = found;
      fading = fading || over;
    });
    begun = true;
    clearTimeout(timer);
    if (fading) timer = setTimeout(() => showFlows(state, at), FADING_MS);
    Object.keys(ended).forEach((key) => {
      if (!state.requests.some((request) => request.key === key)) delete ended[key];
    });
    keep(flows, "flow", Object.keys(shown), (key, known) => {
      const flow = shown[key];
      const from = at[flow.request.entry];
      const to = at[flow.request.serving];
      const path = known || draw("path", {});
      path.setAttribute("d", from === to ? around(from) : ["M", from.x, from.y, "L", to.x, to.y].join(" "));
      path.setAttribute("class", "flow " + (flow.going ? (flow.told ? "back" : "there") : "over"));
      return path;
    });
  }

  window.addEventListener("resize", () => last && show(last));
  return show;
}

// Children of `parent` by key: made or changed by `update`, and taken away where their key is gone.
function keep(parent, kind, keys, update) {
  const known = {};
  Array.prototype.slice.call(parent.children).forEach((child) => {
    known[child.getAttribute("data-" + kind)] = child;
  });
  keys.forEach((key) => {
    const child = update(key, known[key]);
    if (child !== known[key]) {
      child.setAttribute("data-" + kind, key);
      parent.appendChild(child);
    }
    delete known[key];
  });
  Object.keys(known).forEach((key) => parent.removeChild(known[key]));
}

// This node first, then the others by name; no more than can be told apart.
function ordered(state) {
  const others = Object.keys(state.nodes).filter((id) => id !== state.local);
  others.sort((a, b) => (state.nodes[a].name < state.nodes[b].name ? -1 : 1));
  return [state.local].concat(others).slice(0, BOXES_MAX);
}

function label(state, count) {
  const more = Object.keys(state.nodes).length - count;
  return (
    "Drawing of " + count + " boxes with " + state.nodes[state.local].name + ", this node, in the middle" +
    (more > 0 ? "; " + more + " more are in the table" : "") + ". The table of all nodes says the same."
  );
}

// Where boxes are: this node in the middle of a ring where there is room, else above the others in rows.
export function places(others, width) {
  if (width >= WIDE && others <= RING_MAX) {
    const flat = others < 3;
    const height = flat ? HEIGHT + 56 : HEIGHT * (others > 5 ? 4.7 : 4);
    const middle = { x: width / 2, y: height / 2 };
    const radius = { x: Math.min(width / 2 - WIDTH / 2 - 8, 340), y: height / 2 - HEIGHT / 2 - 8 };
    if (others === 1) {
      const away = Math.min(WIDTH, width / 4);
      return { width: width, height: height, at: [move(middle, -away, 0), move(middle, away, 0)] };
    }
    const at = [middle];
    for (let index = 0; index < others; index += 1) {
      const angle = Math.PI + (2 * Math.PI * index) / others;
      at.push(move(middle, radius.x * Math.cos(angle), radius.y * Math.sin(angle)));
    }
    return { width: width, height: height, at: at };
  }
  const columns = Math.max(1, Math.min(others, Math.floor((width + GAP) / (WIDTH + GAP))));
  const step = width / columns;
  const at = [{ x: width / 2, y: HEIGHT / 2 + 18 }];
  for (let index = 0; index < others; index += 1) {
    const row = Math.floor(index / columns);
    const inRow = Math.min(columns, others - row * columns);
    const left = (width - inRow * step) / 2;
    at.push({
      x: left + step * ((index % columns) + 0.5),
      y: HEIGHT / 2 + 18 + (row + 1) * (HEIGHT + GAP + 14),
    });
  }
  return { width: width, height: at[at.length - 1].y + HEIGHT / 2 + 8, at: at };
}

function move(point, x, y) {
  return { x: point.x + x, y: point.y + y };
}

function between(line, from, to) {
  line.setAttribute("x1", from.x);
  line.setAttribute("y1", from.y);
  line.setAttribute("x2", to.x);
  line.setAttribute("y2", to.y);
}

function around(point) {
  const x = WIDTH / 2 + 5;
  const y = HEIGHT / 2 + 5;
  return ["M", point.x - x, point.y - y, "h", 2 * x, "v", 2 * y, "h", -2 * x, "z"].join(" ");
}

function box() {
  const parts = {
    frame: draw("rect", { class: "frame", width: WIDTH, height: HEIGHT, rx: 10 }),
    dot: draw("circle", { class: "dot", cx: 15, cy: 19, r: 4.5 }),
    name: draw("text", { class: "name", x: 27, y: 24 }),
    part: draw("text", { class: "part", x: WIDTH - 12, y: 23, "text-anchor": "end" }),
    profile: draw("text", { class: "profile", x: 12, y: 43 }),
    slots: draw("g", { class: "slots", transform: "translate(12 51)" }),
    kvAll: draw("rect", { class: "kv all", x: 12, y: 68, width: WIDTH - 24, height: 4, rx: 2 }),
    kv: draw("rect", { class: "kv", x: 12, y: 68, width: 0, height: 4, rx: 2 }),
    state: draw("text", { class: "state", x: 12, y: 87 }),
  };
  parts.group = draw(
    "g", {}, parts.frame, parts.dot, parts.name, parts.part, parts.profile, parts.slots, parts.kvAll, parts.kv,
    parts.state,
  );
  return parts;
}

function place(parts, state, id, point) {
  const node = state.nodes[id];
  const local = id === state.local;
  parts.group.setAttribute(
    "transform", "translate(" + (point.x - WIDTH / 2) + " " + (point.y - HEIGHT / 2) + ")",
  );
  const well = node.state === "alive" && node.engine === "ready";
  parts.group.setAttribute("class", "box " + node.state + (local ? " local" : "") + (well ? " well" : ""));
  const part = role(state, id);
  say(parts.name, short(node.name, part ? 11 : 17));
  say(parts.part, part);
  say(parts.profile, short(offer(node), 25));
  slots(parts.slots, node);
  parts.kv.setAttribute("width", answers(node) ? (WIDTH - 24) * Math.min(1, node.kv_pressure) : 0);
  say(parts.state, (local ? "this node · " : "") + condition(node));
}

export function role(state, id) {
  if (state.log.leader && state.log.leader.id === id) return "leader";
  const member = state.log.members.filter((found) => found.id === id)[0];
  return member ? (member.voter ? "voter" : "learner") : "";
}

// Whether what the node last said of its load still means something.
export function answers(node) {
  return node.state === "alive" || node.state === "suspect";
}

export function condition(node) {
  if (node.state !== "alive") return node.state;
  if (node.engine !== "ready") return node.engine === "draining" ? "leaving" : "engine " + node.engine;
  if (node.queued) return node.queued + " waiting";
  return node.running ? "busy" : "free";
}

// What a node is for: the domains of its profiles, and their names where the node is called otherwise.
function offer(node) {
  const domains = [].concat(...node.profiles.map((profile) => profile.domains)).join(", ");
  const names = node.profiles.map((profile) => profile.name).filter((name) => name !== node.name);
  return names.concat(domains || (node.profiles.length ? "any question" : "nothing yet")).join(": ");
}

function slots(group, node) {
  const shown = Math.min(node.slots, SLOTS_MAX);
  while (group.children.length > shown) group.removeChild(group.lastChild);
  while (group.children.length < shown) {
    group.appendChild(draw("rect", { x: group.children.length * 14, width: 10, height: 10, rx: 2.5 }));
  }
  // Where there are more slots than can be drawn, each square stands for as many.
  const full = node.slots && answers(node) ? Math.ceil((node.running * shown) / node.slots) : 0;
  Array.prototype.forEach.call(group.children, (square, index) => {
    square.setAttribute("class", index < full ? "slot busy" : "slot");
  });
}

function short(name, most) {
  return name.length <= most ? name : name.slice(0, most - 1) + "…";
}
