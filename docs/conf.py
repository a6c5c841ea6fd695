"""The site that `make docs` builds. Its source is the whole repository, so that links to READMEs and pictures hold."""

from sphinx.application import Sphinx

from efficientllm import __version__

project, author, copyright = "efficientllm", "the efficientllm authors", "the efficientllm authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "benchmarks/*.md",
    "experiments/**.md",
    "findings/*.md",
]
exclude_patterns = [".venv", ".git", "docs/_build", "src", "tests"]  # not walked through

myst_heading_anchors = 3  # links such as README.md#scales
myst_links_external_new_tab = False

default_role = "py:obj"  # `Limits` in a docstring is a link where it is known, and code where it is not
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
add_module_names = False

smartquotes = False  # `--` is a flag here

html_theme = "furo"
html_title = f"efficientllm {__version__}"
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # the first page is docs/index.html
html_copy_source = False
html_show_sphinx = False
html_use_index = False


def add_title(app: Sphinx, name: str, content: list[str]) -> None:
    """Gives the tables that experiments print (results-tiny.md) the title that a page needs."""
    folder, _, page = name.rpartition("/")
    if page.startswith("results-"):
        title = f"Every row of {folder.rpartition('/')[2]}, {page.removeprefix('results-')}"
        content[0] = f"---\norphan: true\n---\n\n# {title}\n\n{content[0]}"


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_title)
