"""`tinyalign app`: ask a model about pictures, teach it, and look into its memory, in a browser."""

import contextlib
import html
import os
import tempfile
from collections.abc import Iterator
from unittest.mock import patch

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("`tinyalign app` needs gradio: pip install tinyalign-vlm[app]") from error

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .answers import SAFE_HOSTS
from .app_html import CSS
from .app_pages import Pages
from .uploads import Guard
from .visitor import MAY, Shared, load_shared

UPLOAD_SIZE = "32mb"
KEPT_SECONDS = 3600  # an upload of somebody who has left without a word
HEADLINE = "Ask about a picture, see which examples the answer rests on, and teach it what it does not know."
# Fonts of the visitor's own machine: Gradio's themes load theirs from Google.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def start_app(
    model: str,
    revision: str = "main",
    memory_bank: str | None = None,
    visitors_may: str | None = None,
    host: str | None = "127.0.0.1",
    port: int | None = 7860,
    device: str = "auto",
    **settings,
):
    """Serve the app until it is stopped; the arguments are those of `tinyalign app --help`.

    Args:
        host, port: None: as Gradio's environment variables say, which a Space sets.
        settings: `question` that is asked where a visitor writes none.
    """
    if visitors_may is None:
        visitors_may = "save" if host in SAFE_HOSTS else "ask"
    if visitors_may not in MAY:
        raise ValueError(f"visitors_may is {visitors_may!r}, expected one of {', '.join(MAY)}.")
    shared = load_shared(model, revision, memory_bank, device, may=visitors_may, **settings)
    may = ", ".join(MAY[: MAY.index(visitors_may) + 1])
    try:
        with serving(shared, host, port) as app:
            print(f"Open {app.local_url}  (Ctrl-C ends it; visitors may {may})")
            app.block_thread()
    except (OSError, OverflowError) as error:  # Gradio's tells of its own arguments
        raise OSError(f"{host}, port {port}, cannot be opened ({error}): pass other --host or --port.") from error


@contextlib.contextmanager
def serving(shared: Shared, host: str | None = "127.0.0.1", port: int | None = None) -> Iterator[gr.Blocks]:
    """Serve the app meanwhile; what was uploaded is deleted at the end. A `port` of None is the first that is free."""
    # Gradio asks for its own page before it is ready, of which no proxy knows
    direct = [os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), "127.0.0.1", "localhost", "::1"]
    direct = ",".join(filter(None, direct))  # without brackets, in which httpx would look for a port
    with (
        tempfile.TemporaryDirectory(prefix="tinyalign-app-") as uploads,
        patch.dict(os.environ, GRADIO_TEMP_DIR=uploads, NO_PROXY=direct, no_proxy=direct),
    ):
        app, guards = build_app(shared), [Middleware(Guard)]
        if host in SAFE_HOSTS:  # else a page whose name leads here could push with the user's token
            guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=SAFE_HOSTS))
        # off is said where it is the default, too: environment variables and Spaces switch some of it on
        app.queue(max_size=64, api_open=False).launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=UPLOAD_SIZE,
            allowed_paths=[],
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            state_session_capacity=100,
            app_kwargs={"middleware": guards},
            theme=gr.themes.Default(**FONTS),
            css=CSS,
        )
        yield app
        app.close()


def build_app(shared: Shared) -> gr.Blocks:
    """Return the page with its three tabs."""
    pages = Pages(shared)
    with gr.Blocks(
        title=f"TinyAlign: {shared.name}", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)
    ) as app:
        gr.Markdown(f"# TinyAlign · {html.escape(shared.name)}\n{HEADLINE}")
        if shared.problem is not None:
            gr.Markdown(f"**Without memory.** {html.escape(shared.problem)}", elem_id="problem")
        with gr.Tab("Ask", id="ask"):
            pages.ask_tab()
        if shared.has_memory:
            with gr.Tab("Teach", id="teach"):
                pages.teach_tab()
            with gr.Tab("Bank", id="bank") as tab:
                pages.bank_tab(tab)
        pages.connect()
        app.unload(pages.leave)
    return app
