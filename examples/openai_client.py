"""Talk to a running ``vllm serve`` with the official OpenAI client: completion and chat, whole and streamed.

python examples/openai_client.py --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse

from openai import OpenAI

PROMPT = "def read(self, size=-1):"
QUESTION = "Write the Python function read."


def main() -> None:
    """Send requests and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="the server's address, with /v1")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key="none")
    model = client.models.list().data[0].id
    print(f"model: {model}")

    completion = {"model": model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    print(f"--- completion\n{client.completions.create(**completion).choices[0].text}")
    print("--- completion, streamed")
    for chunk in client.completions.create(**completion, stream=True):
        if chunk.choices:
            print(chunk.choices[0].text, end="", flush=True)
    print()

    for mode in ("ar", "self_speculation", "auto", "diffusion"):
        answer = client.completions.create(**completion, extra_body={"vllm_xargs": {"nld.mode": mode}})
        print(f"--- mode {mode}\n{answer.choices[0].text}")

    chat = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 48,
        "temperature": 0,
    }
    print(f"--- chat\n{client.chat.completions.create(**chat).choices[0].message.content}")
    print("--- chat, streamed")
    for chunk in client.chat.completions.create(**chat, stream=True):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
