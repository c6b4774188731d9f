"use strict";
(() => {
  if (navigator.language.toLowerCase().startsWith("zh")) document.getElementById("lang-zh").checked = true;
  const boxes = [...document.querySelectorAll(".runs input")];
  const number = (value) => (Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(1) : value.toFixed(4));

  const follow = (box) => {
    const svg = box.querySelector("svg");
    const points = JSON.parse(document.getElementById(`${box.id}-points`).textContent);
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const make = (name, attributes) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const key in attributes) node.setAttribute(key, attributes[key]);
      return svg.appendChild(node);
    };
    const rule = make("line", { class: "rule", y1: 12, y2: height - 28, visibility: "hidden" });
    // Over the points, whose own tooltips are for pages without scripts.
    const area = make("rect", { class: "area", x: 0, y: 0, width, height });
    const tip = box.appendChild(document.createElement("div"));
    tip.className = "tip";
    tip.hidden = true;

    const line = (run, name, value) => {
      const row = document.createElement("div");
      const label = row.appendChild(document.createElement("span"));
      if (run !== null) label.appendChild(document.createElement("i")).className = `r${run}`;
      label.append(name);
      row.appendChild(document.createElement("b")).textContent = value;
      return row;
    };
    const hide = () => {
      tip.hidden = true;
      rule.setAttribute("visibility", "hidden");
    };
    const nearest = (among, x) => among.reduce((best, p) => (Math.abs(p.x - x) < Math.abs(best.x - x) ? p : best));
    const show = (event) => {
      const frame = svg.getBoundingClientRect();
      const scale = frame.width / width;
      const shown = points.filter((p) => boxes[p.run].checked);
      if (!shown.length) return hide();
      const near = nearest(shown, (event.clientX - frame.left) / scale);
      const rows = [line(null, "step", near.step)];
      for (const [run, input] of boxes.entries()) {
        const own = shown.filter((p) => p.run === run);
        if (!own.length || near.x < own[0].x || near.x > own[own.length - 1].x) continue;
        const point = nearest(own, near.x);
        const where = point.step === near.step ? "" : ` @ ${point.step}`;
        rows.push(line(run, input.dataset.run + where, number(point.loss)));
      }
      tip.replaceChildren(...rows);
      rule.setAttribute("x1", near.x);
      rule.setAttribute("x2", near.x);
      rule.setAttribute("visibility", "visible");
      tip.hidden = false;
      const place = near.x * scale;
      tip.style.left = `${place + (place > frame.width / 2 ? -tip.offsetWidth - 12 : 12)}px`;
    };
    area.addEventListener("pointermove", show);
    area.addEventListener("pointerdown", show);
    area.addEventListener("pointerleave", hide);
  };
  document.querySelectorAll(".frame").forEach(follow);
})();
