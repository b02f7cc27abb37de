"""`tinyalign serve`."""

import argparse

from .options import add_model_to_ask

SUMMARY = "answer chats with images over HTTP, as OpenAI's API does"
HELP = """
Answer chats with images over HTTP, as OpenAI's API does: POST /v1/chat/completions, streamed or not, GET /v1/models.

  tinyalign serve demo/checkpoint --memory_bank demo/bank_with_heldout
  tinyalign serve org/model                               # the bank that its config names, at its commit
  tinyalign serve org/model --memory off                  # answer without retrieval
  tinyalign serve org/model --allow_image_host images.example --allow_image_host cdn.example:8443

and then, in Python (pip install openai):

  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
             {"type": "text", "text": "What is it?"}]
  client.chat.completions.create(model="org/model", messages=[{"role": "user", "content": content}], stream=True)

A request may say "memory": "off", and "sources": true to get the neighbours that the answer rests on, beside it.

Only this model is served, and no code of its checkpoint is run. Images come in the request, as data: URLs (PNG, JPEG,
WebP, GIF, BMP). A URL is fetched only from a host that --allow_image_host names, and only if all its addresses are
public: no redirects, 20 seconds, 32 MiB. There is no authentication: put a proxy that has it in front
before you pass another --host. It needs the extra `serve`: pip install tinyalign-vlm[serve].
"""


def add_arguments(parser: argparse.ArgumentParser):
    add_model_to_ask(parser)
    parser.add_argument("--memory", choices=("on", "off"), default="on", help="off: without retrieval")
    hosts = {"action": "append", "default": [], "metavar": "HOST"}
    parser.add_argument("--allow_image_host", **hosts, help="fetch images from there, too; may be repeated")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of an answer (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.inference.serve import serve

    serve(**vars(arguments))
