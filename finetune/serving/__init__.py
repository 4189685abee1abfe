"""A trained model behind OpenAI's interface, with a page of its own: `finetune serve`.

Read `worker` first: one thread draws the tokens of all requests, in batches. `served` makes prompts
and hands them to it. `requests` says what a client may ask, and `app` is the web server. It is for
one person at one machine; servers for many are named in the guide.
"""
