// Sets the formulas of a page with the copy of MathJax beside this file. Pages without formulas load nothing.
if (document.querySelector(".arithmatex")) {
  window.MathJax = {
    loader: { load: ["input/tex", "output/svg", "a11y/assistive-mml"] },
    tex: { packages: ["base", "ams"], inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
    options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
  };
  const script = document.createElement("script");
  script.src = new URL("mathjax/startup.js", document.currentScript.src).href;
  document.head.append(script);
}
