"""Sphinx configuration of the site; `dsv site` writes the pages and calls it."""

import lzma
from pathlib import Path

import dsvlib
from companion.site.content import plain_docstring

project = "Deep support vectors"
author = "The dsvlib authors"
copyright = "the dsvlib authors, MIT licence"
version = release = dsvlib.__version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
root_doc = "index"
exclude_patterns = ["**/.ipynb_checkpoints"]
default_role = "literal"  # `names` in docstrings are code, as they are in Markdown

# The notebooks have been executed by `dsv reproduce`; a site that ran them could differ from it.
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # would come from a CDN; without a kernel a widget does nothing
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
nb_render_markdown_format = "myst"  # formulas in what cells show
mathjax_path = "vendor/mathjax/tex-svg.js"
# Notebooks are written to be read from the first cell on; their headings may skip a level.
suppress_warnings = ["myst.header"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "Deep support vectors, reproduced"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("../glossary.js", {"defer": "defer"}), ("site.js", {"defer": "defer"})]
html_domain_indices = False  # the reference is the index of modules
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b4f6c",
        "color-brand-content": "#0b5a7d",
        "color-brand-visited": "#5b3f8c",
        "color-foreground-secondary": "#4d5358",
        "color-foreground-muted": "#5f666d",
        "color-background-primary": "#fdfcf9",
        "color-background-secondary": "#f5f2ea",
    },
    "dark_css_variables": {
        "color-brand-primary": "#8ecae6",
        "color-brand-content": "#8ecae6",
        "color-brand-visited": "#c9b3f0",
        "color-foreground-secondary": "#b9bec4",
        "color-foreground-muted": "#a3a9b0",
        "color-background-primary": "#14171a",
        "color-background-secondary": "#1a1e22",
    },
}


def setup(app):
    """Take docstrings as the plain text that they are, and unpack MathJax."""

    def plain(_app, _what, _name, _object, _options, lines):
        lines[:] = plain_docstring(lines)

    app.connect("autodoc-process-docstring", plain)

    def unpack(_app, error):
        """Unpack what is packed in git: two megabytes of the tracked tree would be MathJax."""
        packed = Path(_app.outdir, "_static", f"{mathjax_path}.xz")
        if error is None and packed.is_file():
            packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
            packed.unlink()

    app.connect("build-finished", unpack)
