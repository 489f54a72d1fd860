(() => {
  "use strict";
  // the theme: as the system has it, or as the reader chose; storage may be refused
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const stored = (value) => {
    try {
      if (value) localStorage.setItem("kelib-theme", value);
      return localStorage.getItem("kelib-theme");
    } catch {
      return value;
    }
  };
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  show(themes.includes(stored()) ? stored() : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3];
    stored(next);
    show(next);
  });

  // contents are folded on a small screen, and say where one is on a large one
  const contents = document.getElementById("contents");
  contents.open = window.matchMedia("(min-width: 68rem)").matches;
  const links = [...contents.querySelectorAll("a")];
  const places = links.map((a) => document.getElementById(a.hash.slice(1)));
  const mark = () => {
    const at = places.findLastIndex((place) => place.getBoundingClientRect().top < 120);
    links.forEach((a, n) => (n === at ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current")));
  };
  let waiting = false;
  window.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      mark();
    });
  }, { passive: true });

  // charts: the library is read once, when the first of them comes near
  let embed;
  const vega = () => {
    if (!embed) {
      const script = document.createElement("script");
      script.textContent = document.getElementById("vega").textContent;
      document.head.append(script);
      embed = window.vegaEmbed;
    }
    return embed;
  };
  const draw = async (chart) => {
    chart.classList.add("ready"); // before, for the chart asks how wide its place is
    try {
      const spec = JSON.parse(chart.querySelector("script").textContent);
      await vega()(chart.querySelector(".live"), spec, { actions: false, renderer: "svg" });
    } catch (error) {
      chart.classList.remove("ready"); // the still picture is better than none
      console.error(error);
    }
  };
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        near.unobserve(target);
        draw(target);
      }
    }
  }, { rootMargin: "600px" });
  for (const chart of document.querySelectorAll(".chart")) near.observe(chart);

  // on paper everything is unfolded
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const one of folded) one.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const one of folded) one.open = false;
  });
})();
