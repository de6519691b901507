"""Ask a server with the vision-language model about a picture, and print the answer as it comes.

python examples/describe_image.py picture.png "What is in the picture?" --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="a file, or a http address, which the server then loads")
    parser.add_argument("question", nargs="?", default="What is in the picture?")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--mode", default="auto", choices=["auto", "ar", "self_speculation", "diffusion"])
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens to generate at most (default: 128)")
    return parser.parse_args()


def address_of(picture: str) -> str:
    """Return an address that holds a file's content; a http address is returned as it is."""
    if picture.startswith(("http://", "https://")):
        return picture
    kind = mimetypes.guess_type(picture)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"


def main() -> None:
    """Send the picture and the question in one message."""
    args = parse_arguments()
    client = OpenAI(base_url=args.base_url, api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": address_of(args.picture)}},
                    {"type": "text", "text": args.question},
                ],
            }
        ],
        temperature=0,
        max_tokens=args.max_tokens,
        stream=True,
        extra_body={"vllm_xargs": {"nld.mode": args.mode}},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
