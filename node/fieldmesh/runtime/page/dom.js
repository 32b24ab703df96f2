// Makes elements. Text is only ever set as text: what a model or a node wrote is never read as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  Object.keys(attributes).forEach((name) => {
    const value = attributes[name];
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  });
  children.forEach((child) => {
    if (child !== null && child !== "") element.appendChild(typeof child === "object" ? child : text(child));
  });
  return element;
}

export function text(value) {
  return document.createTextNode(String(value));
}

export function make(name, attributes, ...children) {
  return fill(document.createElement(name), attributes || {}, children);
}

export function draw(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes || {}, children);
}

export function find(id) {
  return document.getElementById(id);
}

export function replace(element, children) {
  while (element.firstChild) element.removeChild(element.firstChild);
  children.forEach((child) => element.appendChild(child));
}

// Sets text only where it differs, so that nothing is read out or selected anew without need.
export function say(element, value) {
  if (element.textContent !== value) element.textContent = value;
}
