"use strict";
(() => {
  if (navigator.language.toLowerCase().startsWith("zh")) document.getElementById("lang-zh").checked = true;

  const box = document.getElementById("loss-chart");
  if (!box) return;
  const svg = box.querySelector("svg");
  const points = JSON.parse(document.getElementById("loss-points").textContent);
  if (points.length < 2) return;

  const make = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return svg.appendChild(node);
  };
  const rule = make("line", { class: "rule", y1: 12, y2: 340, visibility: "hidden" });
  const mark = make("circle", { class: "mark", r: 4.5, visibility: "hidden" });
  // Over the points, whose own tooltips are for pages without scripts.
  const area = make("rect", { class: "area", x: 0, y: 0, width: 800, height: 366 });
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  box.appendChild(tip);

  const number = (value) => (value === null ? "–" : Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(1) : value.toFixed(4));
  const hide = () => {
    tip.hidden = true;
    rule.setAttribute("visibility", "hidden");
    mark.setAttribute("visibility", "hidden");
  };
  const show = (event) => {
    const frame = svg.getBoundingClientRect();
    const scale = frame.width / 800;
    const x = (event.clientX - frame.left) / scale;
    const near = points.reduce((best, p) => (Math.abs(p.x - x) < Math.abs(best.x - x) ? p : best));
    rule.setAttribute("x1", near.x);
    rule.setAttribute("x2", near.x);
    rule.setAttribute("visibility", "visible");
    if (near.y !== null) {
      mark.setAttribute("cx", near.x);
      mark.setAttribute("cy", near.y);
    }
    mark.setAttribute("visibility", near.y === null ? "hidden" : "visible");
    const rows = [["step", near.step], ["loss", number(near.loss)], ["smoothed", number(near.smooth)]];
    if (near.eval !== null) rows.push(["eval", number(near.eval)]);
    rows.push(["lr", near.lr.toExponential(2)]);
    tip.replaceChildren(...rows.map(([name, value]) => {
      const row = document.createElement("div");
      const label = row.appendChild(document.createElement("span"));
      label.textContent = name;
      row.appendChild(document.createElement("b")).textContent = value;
      return row;
    }));
    tip.hidden = false;
    const place = near.x * scale;
    tip.style.left = `${place + (place > frame.width / 2 ? -tip.offsetWidth - 12 : 12)}px`;
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", hide);
})();
