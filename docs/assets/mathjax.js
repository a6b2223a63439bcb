window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
// Pages are exchanged without a reload.
document$.subscribe(() => { if (MathJax.typesetPromise) { MathJax.typesetClear(); MathJax.typesetPromise(); } });
