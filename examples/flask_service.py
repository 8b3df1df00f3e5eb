"""A threaded Flask service for polls that loses no vote.

    pip install '.[examples]'
    REDIS_URL=redis://localhost:6379 flask --app examples/flask_service.py run

    curl -X POST localhost:5000/polls/lunch/pizza
    curl localhost:5000/polls/lunch

One Cache serves all threads, and all processes of a forking server.
"""

import os

from flask import Flask, abort

import dscache

cache = dscache.Cache.from_config(os.environ.get("REDIS_URL", "redis://localhost:6379"))
app = Flask(__name__)


@app.get("/polls/<name>")
def read(name):
    record = cache.get(f"poll/{name}")
    if record is None:
        abort(404)
    return app.response_class(record.raw, mimetype="application/json")


@app.post("/polls/<name>/<answer>")
def vote(name, answer):
    def add_vote(votes):
        votes[answer] = votes.get(answer, 0) + 1
        return votes

    # If another thread or process has voted meanwhile, the vote is added to its count.
    return cache.update(f"poll/{name}", add_vote, default={}).data


@app.errorhandler(dscache.DscacheError)
def unavailable(error):
    return {"error": str(error)}, 503


if __name__ == "__main__":
    app.run(threaded=True)
