# %% [markdown]
# # New items and missing pictures
#
# Some items have no picture, others no text, and every day brings items that nobody has seen. What the model does with each, on the
# generated shop, after a plain `pip install missrec-t4r`.

# %%
import pandas as pd

import missrec_t4r as mr
from missrec_t4r import commands
from missrec_t4r.pages.charts import bars
from missrec_t4r.recommender.evaluation import Chart

commands.generate("shop", users=400, items=150)
events = pd.read_parquet("shop/interactions.parquet")
items = pd.read_parquet("shop/items.parquet")
shop = mr.Shop.from_frames(events, items, text=["title", "description"], image="image", images="shop", folder="work")
shop

# %% [markdown]
# ## What is missing
#
# An empty text or picture is no error: the item lacks that modality, and its score comes from what it has.

# %%
has = {name: int(modality.present.sum()) for name, modality in shop.catalogue.modalities.items()}
never = int((shop.catalogue.train_count[3:] == 0).sum())
counts = {"items": shop.catalogue.n_items, **{f"with {name}": n for name, n in has.items()}, "never bought": never}
Chart("The catalogue", [bars(list(counts), list(counts.values()), x_title="", y_title="items")])

# %%
model = mr.Recommender("tiny").fit(shop)
evaluation = model.evaluate()
evaluation.slices("ndcg@10")

# %% [markdown]
# `cold` are sessions whose next item has no event in training, `without_image` those whose next item has no picture. Columns are the
# systems; `n` is the number of sessions: with so few, differences between systems are noise.

# %%
evaluation.plot("ndcg@10", slices=["all", "rare", "cold", "without_image", "without_text"])

# %% [markdown]
# ## An item that appeared this morning
#
# Three new items with the text of a known one: with its picture, without a picture, and without either. No training: their
# vectors come from the encoders that the shop was built with.

# %%
twin = items.dropna(subset=["title", "image"]).iloc[0]
new = pd.DataFrame([twin, twin, twin]).assign(item_id=["new", "new without picture", "new without both"])
new.loc[new["item_id"] != "new", "image"] = None
new.loc[new["item_id"] == "new without both", ["title", "description"]] = None
changed = model.add_items(new)
{name: changed[name] for name in ("added", "changed", "retired", "items")}

# %% [markdown]
# How similar each of them is to the known item, by content. An item without any content has no vector: nothing can be similar to it,
# and only its popularity can recommend it, once it has events.

# %%
similar = model.similar(twin["item_id"], k=len(items), by="content").set_index("item")["score"]
scores = {name: float(similar.get(name, 0.0)) for name in new["item_id"]}
Chart("Similarity to the known item", [bars(list(scores), list(scores.values()), x_title="", y_title="score")])

# %% [markdown]
# In a session with the known item, the place of each among all items; the one without any content is not among them. How far up new
# items come is tuned on validation (the rare-item term); `model__cold_start_exposure=1` in `Recommender` raises them, at a price for the
# others.

# %%
ranked = model.recommend(sessions=[[twin["item_id"]]], k=len(items) + 3)
ranked[ranked["item"].isin(new["item_id"])][["item", "rank", "reason"]]

# %% [markdown]
# ## Gone again
#
# `retired` takes an item out of all recommendations.

# %%
model.add_items(new.head(1).assign(retired=True))
left = model.recommend(sessions=[[twin["item_id"]]], k=len(items) + 3)["item"].tolist()
assert "new" not in left
assert "new without picture" in left
