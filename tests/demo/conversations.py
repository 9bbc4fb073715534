"""A request, the best reply to it, and the text of a conversation."""

PROMPT = "Hello. Order 403 is four days late. Where is the kettle? Thanks."
BEST = (
    "Hello! I am sorry that the kettle is late. I have asked the courier to trace order 403. "
    "The kettle will arrive on Friday. Let me know if you have any questions. Have a nice day!"
)


def content(messages: list[dict[str, str]]) -> str:
    (message,) = messages
    return message["content"]
