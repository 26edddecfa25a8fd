// Elements of a page, made in one line each.
(function (scope) {
  "use strict";

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function action(words, act, properties = {}) {
    const button = make("button", { type: "button", ...properties }, words);
    button.addEventListener("click", act);
    return button;
  }

  // A canvas in pixels of the screen, to draw on in pixels of the page: [context, width, height].
  function prepare(canvas, width, height) {
    const density = scope.devicePixelRatio || 1;
    [canvas.width, canvas.height] = [Math.round(width * density), Math.round(height * density)];
    const context = canvas.getContext("2d");
    context.scale(density, density);
    return [context, width, height];
  }

  Object.assign(scope.dsmoePlayground, { make, action, prepare });
})(typeof globalThis === "undefined" ? self : globalThis);
