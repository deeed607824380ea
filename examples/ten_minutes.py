# %% [markdown]
# # Ten minutes to recommendations
#
# From two tables to recommendations, an evaluation and a saved model. `pip install missrec-t4r` is enough: no Merlin, no GPU, no
# server. The shop is generated; with tables of your own, begin at `Shop.from_frames`.

# %%
import pandas as pd

import missrec_t4r as mr
from missrec_t4r import commands

made = commands.generate("shop", users=400, items=150)
events = pd.read_parquet("shop/interactions.parquet")
items = pd.read_parquet("shop/items.parquet")
events.head(3)

# %%
items[["item_id", "title", "image", "price"]].head(3)

# %% [markdown]
# ## Sessions and vectors
#
# Columns are named where they differ from `user_id`, `item_id` and `timestamp`. Titles and pictures become vectors with encoders that
# need no download; `text_encoder=` and `image_encoder=` take a CLIP or sentence model (`missrec-t4r[features]`).

# %%
shop = mr.Shop.from_frames(events, items, text=["title", "description"], image="image", images="shop", folder="work")
shop

# %% [markdown]
# ## A model
#
# The recipe `tiny` trains for seconds, so that a test can run this page: leave it out for a model to use. A training that was
# interrupted goes on with the next `fit`.

# %%
model = mr.Recommender("tiny").fit(shop)
model

# %% [markdown]
# ## Is it any good?
#
# The last item of every user is the target, and the whole catalogue is ranked, beside baselines that are tuned on the same validation
# split. *Excluded*: items of the session cannot be recommended, as most shops serve.

# %%
evaluation = model.evaluate()
evaluation.to_frame().loc["excluded"].round(4)

# %%
evaluation.plot("ndcg@10")

# %% [markdown]
# ## Recommendations
#
# Users of the shop, or sessions of item ids. `reason` names the item of the session that contributed most, and how.

# %%
users = events["user_id"].unique()[:2].tolist()
model.recommend(users=users, k=3)

# %% [markdown]
# Filters use the columns of the item table, and hold whatever the scores are.

# %%
cheap = model.recommend(users=users, k=3, where={"price": {"max": 60}}, exclude_seen=True)
cheap.merge(items[["item_id", "price"]], left_on="item", right_on="item_id")[["user", "item", "price", "score"]]

# %%
known = items["item_id"].tolist()
model.recommend(sessions=[[known[0], known[5]]], k=3)

# %%
model.similar(known[0], k=3, by="content")

# %% [markdown]
# ## Keep it, and the same on the command line
#
# A saved model is a *bundle*: recommendations without the shop, `missrec score`, `missrec deploy`.
# `with model.serve() as server:` starts a Triton server on this machine (`missrec-t4r[triton]`).

# %%
model.save("bundle")
again = mr.Recommender.load("bundle", shop=shop)
assert again.recommend(users=users, k=3)["item"].tolist() == model.recommend(users=users, k=3)["item"].tolist()
print("\n".join(model.commands))
