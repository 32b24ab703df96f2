// Follows the node's view of the mesh, and notices when the node is gone. Tells `onState` the whole view at each
// change, and `onLink` whether the node answers.

const SILENCE_MS = 6000; // the node says something every two seconds
const AGAIN_MS = 2000;

export function follow(onState, onLink) {
  let state = { nodes: {} };
  let source = null;
  let anew = true;
  let heardAt = 0;
  let timer = 0;

  function take(change) {
    const nodes = Object.assign({}, anew ? {} : state.nodes, change.nodes);
    Object.keys(nodes).forEach((id) => {
      if (nodes[id] === null) delete nodes[id];
    });
    anew = false;
    state = Object.assign({}, state, change, { nodes: nodes });
    heardAt = Date.now();
    onLink(true);
    onState(state);
  }

  function open() {
    close();
    anew = true;
    heardAt = Date.now();
    source = new EventSource("mesh/events");
    source.onmessage = (event) => take(JSON.parse(event.data));
    source.onerror = again;
  }

  function close() {
    clearTimeout(timer);
    if (source) source.close();
    source = null;
  }

  // Where too many pages watch, or something between here and the node holds streams back, it is asked instead.
  function again() {
    close();
    timer = setTimeout(open, AGAIN_MS);
    const limit = new AbortController();
    const late = setTimeout(() => limit.abort(), AGAIN_MS);
    fetch("mesh", { signal: limit.signal, cache: "no-store" })
      .then((response) => (response.ok ? response.json() : Promise.reject(new Error(String(response.status)))))
      .then((whole) => {
        anew = true;
        take(whole);
      })
      .catch(() => onLink(false))
      .then(() => clearTimeout(late));
  }

  setInterval(() => {
    if (source && Date.now() - heardAt > SILENCE_MS) again();
  }, 1000);
  // A browser opens few connections to one place: pages that nobody looks at must not use them up.
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  window.addEventListener("online", () => document.hidden || open());
  if (!document.hidden) open();
}
