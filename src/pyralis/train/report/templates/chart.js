// Charts that say what is under the pointer, and zoom: drag over them, or by buttons and keys. What is drawn in the
// page stays as it is, and is what is printed; a zoomed view is drawn beside it from the same data.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const boxes = [...document.querySelectorAll(".runs input")];
  const exponent = (value, digits) => (value === 0 ? "0" : value.toExponential(digits));
  const NUMBERS = {
    loss: (value) => (Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(1) : value.toFixed(4)),
    rate: (value) => exponent(value, 2),
    percent: (value) => `${Math.round(value * 100)} %`,
    reward: (value) => String(Number(value.toPrecision(3))),
  };
  const niceGap = (low, high, about) => {
    const rough = (high - low) / about;
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((times) => times * power).find((gap) => gap >= rough * 0.999);
  };
  const ticks = (low, high, gap) => {
    const found = [];
    for (let i = Math.ceil(low / gap - 1e-9); i <= Math.floor(high / gap + 1e-9); i++) found.push(i * gap);
    return found;
  };
  const decimals = (gap) => Math.max(0, -Math.floor(Math.log10(gap) + 1e-9));
  const words = (pair) => pair.map((text, i) => {
    const part = document.createElement("span");
    part.className = i ? "zh" : "en";
    part.lang = i ? "zh-Hans" : "en";
    part.textContent = text;
    return part;
  });

  // The curve between steps a and b as unbroken stretches of [step, value], cut at both.
  const between = ({ steps, values }, a, b) => {
    const stretches = [];
    let stretch = [];
    const at = (i, step) => {
      if (values[i] === null || values[i + 1] === null) return;
      const share = (step - steps[i]) / (steps[i + 1] - steps[i]);
      stretch.push([step, values[i] + share * (values[i + 1] - values[i])]);
    };
    const end = () => {
      if (stretch.length) stretches.push(stretch);
      stretch = [];
    };
    for (let i = 0; i < steps.length; i++) {
      if (steps[i] < a) {
        if (steps[i + 1] > a) at(i, a);
      } else if (steps[i] > b) {
        if (i && steps[i - 1] < b) at(i - 1, b);
        break;
      } else if (values[i] === null) end();
      else stretch.push([steps[i], values[i]]);
    }
    end();
    return stretches;
  };

  const enliven = (frame) => {
    const svg = frame.querySelector("svg");
    const { x, panes, curves, breaks } = JSON.parse(frame.querySelector("script").textContent);
    if (!(x.last > x.first)) return;
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const shortest = Math.min(x.last - x.first, (4 * (x.last - x.first)) / Math.max(...curves.map((c) => c.steps.length)));
    let view = [x.first, x.last];

    const make = (parent, name, attributes, text) => {
      const node = parent.appendChild(document.createElementNS(SVG, name));
      for (const key in attributes) node.setAttribute(key, attributes[key]);
      if (text !== undefined) node.textContent = text;
      return node;
    };
    const part = make(svg, "g", { class: "part" });
    const rule = make(svg, "line", { class: "rule", y1: panes[0].top, y2: panes.at(-1).bottom });
    const marks = make(svg, "g", { class: "marks" });
    const choice = make(svg, "rect", { class: "choice", y: panes[0].top, height: panes.at(-1).bottom - panes[0].top });
    // Over the points, whose own tooltips are for pages without scripts.
    const area = make(svg, "rect", { class: "area", x: 0, y: 0, width, height });
    const tip = frame.appendChild(document.createElement("div"));
    tip.className = "tip";

    const shown = () => curves.filter((curve) => curve.run === null || boxes[curve.run].checked);
    const place = (step) => x.left + ((step - view[0]) / (view[1] - view[0])) * (x.right - x.left);
    const stepAt = (px) => view[0] + ((px - x.left) / (x.right - x.left)) * (view[1] - view[0]);
    const zoomed = () => view[0] > x.first || view[1] < x.last;
    const heightOf = (pane, value) => pane.bottom - ((value - pane.low) / (pane.high - pane.low)) * (pane.bottom - pane.top);

    // The panes as they are in this view: y follows what is seen.
    const fitted = (seen) => panes.map((pane, i) => {
      const values = seen.filter(([curve]) => curve.pane === i).flatMap(([, cuts]) => cuts.flat().map((point) => point[1]));
      if (pane.fixed || !values.length || !zoomed()) return pane;
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const margin = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
      return { ...pane, low: low >= 0 ? Math.max(low - margin, 0) : low - margin, high: high + margin };
    });
    let scales = panes;

    const axis = (pane) => {
      const gap = pane.ticks ? null : niceGap(pane.low, pane.high, 6);
      for (const value of pane.ticks ?? ticks(pane.low, pane.high, gap)) {
        const y = heightOf(pane, value);
        make(part, "line", { class: "grid", x1: x.left, x2: x.right, y1: y, y2: y });
        const text = gap ? value.toFixed(decimals(gap)) : pane.number === "rate" ? exponent(value, 1) : NUMBERS[pane.number](value);
        make(part, "text", { class: "tick end", x: x.left - 8, y: y + 4 }, text);
      }
    };

    const draw = () => {
      part.replaceChildren();
      svg.classList.toggle("zoomed", zoomed());
      const seen = shown().map((curve) => [curve, between(curve, ...view)]);
      scales = fitted(seen);
      if (!zoomed()) return;
      scales.forEach(axis);
      const gap = Math.max(1, niceGap(...view, 8));
      for (const step of ticks(...view, gap)) {
        make(part, "text", { class: "tick middle", x: place(step), y: panes.at(-1).bottom + 18 }, step.toFixed(0));
      }
      const [top] = scales;
      for (const step of breaks.filter((step) => step >= view[0] && step <= view[1])) {
        make(part, "line", { class: "broken", x1: place(step), x2: place(step), y1: top.top, y2: top.bottom });
      }
      const ends = [];
      for (const [curve, cuts] of seen) {
        const y = (value) => heightOf(scales[curve.pane], value);
        const line = cuts.map((cut) => `M${cut.map(([step, value]) => `${place(step)} ${y(value)}`).join("L")}`).join("");
        make(part, "path", { class: curve.kind, d: line });
        curve.steps.forEach((step, i) => {
          if (!curve.dots || curve.values[i] === null || step < view[0] || step > view[1]) return;
          make(part, "circle", { class: curve.kind, cx: place(step), cy: y(curve.values[i]), r: 3.5 });
        });
        const last = cuts.at(-1)?.at(-1);
        if (curve.labelled && last) ends.push({ y: y(last[1]) + 4, kind: curve.kind, text: NUMBERS[scales[curve.pane].number](last[1]) });
      }
      ends.sort((a, b) => a.y - b.y).forEach((end, i) => {
        if (i) end.y = Math.max(end.y, ends[i - 1].y + 20);
        make(part, "text", { class: `value ${end.kind}`, x: x.right + 8, y: end.y }, end.text);
      });
    };

    // ---- what is under the pointer ----
    const line = (label, value, run = null) => {
      const row = document.createElement("div");
      const name = row.appendChild(document.createElement("span"));
      if (run !== null) name.appendChild(document.createElement("i")).className = `r${run}`;
      name.append(...label);
      row.appendChild(document.createElement("b")).textContent = value;
      return row;
    };
    const hide = () => {
      frame.classList.remove("pointed");
      marks.replaceChildren();
    };
    const nearest = (curve, step) => {
      let best = -1;
      curve.steps.forEach((own, i) => {
        if (curve.values[i] === null || own < view[0] || own > view[1]) return;
        if (best < 0 || Math.abs(own - step) < Math.abs(curve.steps[best] - step)) best = i;
      });
      return best;
    };
    const point = (px) => {
      const found = shown().map((curve) => [curve, nearest(curve, stepAt(px))]).filter(([, i]) => i >= 0);
      if (!found.length) return hide();
      const steps = found.map(([curve, i]) => curve.steps[i]);
      const step = steps.reduce((best, own) => (Math.abs(own - stepAt(px)) < Math.abs(best - stepAt(px)) ? own : best));
      const rows = [line(words(["step", "步"]), step.toLocaleString("en"))];
      marks.replaceChildren();
      for (const [curve] of found) {
        const i = nearest(curve, step);
        const own = curve.steps[i];
        if (own !== step && (!curve.near || step < curve.steps[0] || step > curve.steps.at(-1))) continue;
        const where = own === step ? curve.name : curve.name.map((text) => `${text} @ ${own}`);
        rows.push(line(words(where), NUMBERS[panes[curve.pane].number](curve.values[i]), curve.run));
        if (!curve.marked) continue;
        make(marks, "circle", { class: `mark ${curve.kind}`, cx: place(own), cy: heightOf(scales[curve.pane], curve.values[i]), r: 4.5 });
      }
      tip.replaceChildren(...rows);
      rule.setAttribute("x1", place(step));
      rule.setAttribute("x2", place(step));
      frame.classList.add("pointed");
      const seen = svg.getBoundingClientRect();
      const at = (place(step) * seen.width) / width;
      tip.style.left = `${at + (at > seen.width / 2 ? -tip.offsetWidth - 12 : 12)}px`;
      tip.style.top = `${seen.top - frame.getBoundingClientRect().top + 12}px`;
    };

    // ---- zoom ----
    const look = (first, last) => {
      const size = Math.min(Math.max(last - first, shortest), x.last - x.first);
      const begin = Math.min(Math.max((first + last - size) / 2, x.first), x.last - size);
      view = [begin, begin + size];
      hide();
      draw();
      const focused = bar.contains(document.activeElement) && document.activeElement.dataset.zoomed === "";
      if (focused && !zoomed()) bar.querySelector("button").focus(); // one that is disabled hears no key
      for (const button of bar.querySelectorAll("[data-zoomed]")) button.disabled = !zoomed();
    };
    const scaled = (times) => {
      const [middle, half] = [(view[0] + view[1]) / 2, ((view[1] - view[0]) * times) / 2];
      look(middle - half, middle + half);
    };
    const moved = (share) => look(view[0] + share * (view[1] - view[0]), view[1] + share * (view[1] - view[0]));
    const reset = () => look(x.first, x.last);
    const bar = document.createElement("div");
    bar.className = "zoom";
    bar.append(...words(["drag to zoom", "拖动可放大"]));
    const button = (sign, names, act, onlyZoomed = true) => {
      const made = bar.appendChild(document.createElement("button"));
      made.type = "button";
      made.append(...(Array.isArray(sign) ? words(sign) : [sign]));
      made.title = names.join(" · ");
      made.setAttribute("aria-label", made.title);
      if (onlyZoomed) made.dataset.zoomed = "";
      made.addEventListener("click", act);
    };
    button("+", ["zoom in", "放大"], () => scaled(0.5), false);
    button("−", ["zoom out", "缩小"], () => scaled(2));
    button("‹", ["to the left", "左移"], () => moved(-0.5));
    button("›", ["to the right", "右移"], () => moved(0.5));
    button(["whole run", "全程"], ["the whole run", "显示全程"], reset);
    frame.prepend(bar);
    frame.addEventListener("keydown", (event) => {
      const acts = { "+": () => scaled(0.5), "=": () => scaled(0.5), "-": () => scaled(2), Escape: reset, 0: reset,
        ArrowLeft: () => moved(-0.25), ArrowRight: () => moved(0.25) };
      if (!(event.key in acts) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      acts[event.key]();
    });

    let from = null;
    const within = (event) => {
      const seen = svg.getBoundingClientRect();
      return Math.min(Math.max(((event.clientX - seen.left) * width) / seen.width, x.left), x.right);
    };
    area.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      from = within(event);
      area.setPointerCapture(event.pointerId);
      point(from);
    });
    area.addEventListener("pointermove", (event) => {
      const to = within(event);
      point(to);
      if (from === null) return;
      choice.setAttribute("x", Math.min(from, to));
      choice.setAttribute("width", Math.abs(to - from));
    });
    const drop = () => {
      from = null;
      choice.setAttribute("width", 0);
    };
    area.addEventListener("pointerup", (event) => {
      const to = within(event);
      const ends = from === null ? [to, to] : [Math.min(from, to), Math.max(from, to)];
      drop();
      if (ends[1] - ends[0] > 6) look(...ends.map(stepAt));
    });
    area.addEventListener("pointercancel", drop);
    area.addEventListener("pointerleave", () => from === null && hide());
    area.addEventListener("dblclick", reset);
    boxes.forEach((box) => box.addEventListener("change", () => look(...view)));
    reset();
  };
  document.querySelectorAll(".frame[data-chart]").forEach(enliven);
})();
