"""A peer that answers without a model: it repeats the prompt's last token, and read what its budget says."""

import json
import sys


def say(message):
    sys.stdout.write("a library says hello\n" + json.dumps(message) + "\n")
    sys.stdout.flush()


def main():
    order = json.loads(sys.stdin.readline())
    if order["budget_bytes"] == 13:
        sys.exit("OutOfMemoryError: 13 bytes are too few")
    say({"name": "accelerate", "version": "9.9", "streamed_bytes_per_token": 1000, "modules": {"disk": 1}})
    for line in sys.stdin:
        request = json.loads(line)
        tokens = request["prompt"][-1:] * request["limit"]
        use = {"core_s": 10.0, "own_s": 9.0, "busy_s": 9.2, "steal_s": 0.0}
        say(
            {
                "token_ids": tokens,
                "ttft_s": 0.5,
                "decode_s": 2.0 * (len(tokens) - 1),
                "read_bytes": order["budget_bytes"] and order["budget_bytes"] * len(tokens),
                "use": use,
                "peak_bytes": 4096,
            }
        )


if __name__ == "__main__":
    main()
