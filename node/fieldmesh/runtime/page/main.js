// Puts the page together: the view of the mesh goes to the drawing and the lists, and to whom may be asked.

import { chat, targets } from "./chat.js";
import { find, make, replace, say } from "./dom.js";
import { follow } from "./live.js";
import { mesh, nameIn, reachable, tell } from "./mesh.js";

let state = null;
let answers = null;

function shown(pane) {
  document.body.setAttribute("data-pane", pane);
  Array.prototype.forEach.call(find("panes").children, (button) => {
    button.setAttribute("aria-pressed", String(button.getAttribute("data-show") === pane));
  });
  window.dispatchEvent(new Event("resize")); // the drawing had no width while it was hidden
}

function here() {
  const profiles = {};
  Object.keys(state.nodes).forEach((id) => {
    if (state.nodes[id].state !== "alive") return;
    state.nodes[id].profiles.forEach((profile) => {
      profiles[profile.name] = profile.domains.join(", ") || "any question";
    });
  });
  const names = Object.keys(profiles).sort();
  const list = find("here");
  const key = names.map((name) => name + profiles[name]).join("\n");
  if (list.getAttribute("data-shown") === key) return;
  list.setAttribute("data-shown", key);
  replace(list, names.map((name) => make("li", {}, make("b", {}, name), " " + profiles[name])));
}

// Says when the node is gone, and which others there were.
function linked(is) {
  if (answers === is) return;
  const name = nameIn(state, state && state.local) || "this node";
  const link = find("link");
  say(link, is ? "live" : "no connection");
  link.className = is ? "live" : "lost";
  const gone = find("gone");
  find("mesh").classList.toggle("past", !is);
  if (is) {
    gone.hidden = true;
    if (answers === false) tell(name + ", this page's node, answers again", "alive");
  } else {
    tell(name + ", this page's node, does not answer", "dead");
    replace(gone, farewell(name));
    gone.hidden = false;
  }
  answers = is;
}

function farewell(name) {
  const found = [make("p", {}, make("b", {}, name + " does not answer."), " This page tries again by itself.")];
  const others = Object.keys(state ? state.nodes : {}).filter((id) => id !== state.local);
  const pages = others.filter((id) => state.nodes[id].state === "alive" && reachable(state.nodes[id]).length);
  if (pages.length) {
    const links = pages.map((id) => {
      const page = reachable(state.nodes[id])[0];
      return make("li", {}, make("a", { href: page, target: "_blank", rel: "noopener" }, state.nodes[id].name), " " + page);
    });
    found.push(make("p", {}, "These were alive; they open in a tab of their own, and this conversation stays here:"));
    found.push(make("ul", {}, ...links));
  }
  return found;
}

const draw = mesh();
find("needs").hidden = true;
find("panes").addEventListener("click", (event) => {
  const pane = event.target.getAttribute("data-show");
  if (pane) shown(pane);
});
Array.prototype.forEach.call(document.querySelectorAll(".skip"), (link) => {
  link.addEventListener("click", () => shown(link.hash === "#mesh" ? "mesh" : "chat"));
});
chat((id) => nameIn(state, id));
follow((now) => {
  state = now;
  const name = nameIn(state, state.local);
  say(find("where"), "mesh " + state.mesh + ", through " + name);
  document.title = name + " · Fieldmesh";
  targets(state.models);
  here();
  draw(state);
}, linked);
