# %% [markdown]
# # Swap in your T4R script
#
# A Transformers4Rec script with an XLNet, and the same script with three objects exchanged: input block, body and task. Schema, T4R's
# own loader, `tr.Trainer` and deployment stay. Needs `missrec-t4r[merlin]` (Python 3.10 or 3.11). The shop is generated.

# %%
import missrec_t4r as mr
import missrec_t4r.t4r  # before Merlin: sets the switches that Merlin 23.8 needs
import transformers4rec.torch as tr
from missrec_t4r import commands
from transformers4rec.config.trainer import T4RecTrainingArguments

LENGTH = 20
commands.generate("shop", users=400, items=150)
commands.etl("shop/interactions.parquet", "shop/items.parquet", "data", max_events=LENGTH, engine="memory")
commands.features("data", text_columns=["title", "description"], image_column="image", images="shop")
schema, catalogue = mr.load_schema("data"), mr.Catalogue.load("data/catalogue")

# %% [markdown]
# ## What stays
#
# One function trains and evaluates whichever model it gets.


# %%
def train(model: tr.Model, folder: str) -> tr.Trainer:
    arguments = T4RecTrainingArguments(
        output_dir=folder,
        data_loader_engine="merlin",
        max_sequence_length=LENGTH,
        num_train_epochs=3,
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        save_strategy="no",
        report_to=[],
        no_cuda=True,
        disable_tqdm=True,
        logging_steps=1000,
    )
    data = {"train_dataset_or_path": "data/train/part_0.parquet", "eval_dataset_or_path": "data/test/part_0.parquet"}
    trainer = tr.Trainer(model=model, args=arguments, schema=schema, compute_metrics=True, **data)
    trainer.train()
    return trainer


# %% [markdown]
# ## Before: XLNet on ids

# %%
items = schema.select_by_name(["item_id-list"])
inputs = tr.TabularSequenceFeatures.from_schema(items, max_sequence_length=LENGTH, d_output=32, masking="clm")
config = tr.XLNetConfig.build(d_model=32, n_head=2, n_layer=1, total_seq_length=LENGTH)
xlnet = config.to_torch_model(inputs, tr.NextItemPredictionTask(weight_tying=True))
before = train(xlnet, "xlnet").evaluate()

# %% [markdown]
# ## After: the three objects
#
# `MultiModalSequenceFeatures` reads the vectors of texts and pictures from the catalogue. Sizes are small here; without arguments the
# parts are the recipe `default`.

# %%
inputs = mr.MultiModalSequenceFeatures.from_schema(schema, catalogue=catalogue, max_sequence_length=LENGTH)
body = tr.SequentialBlock(inputs, mr.MISSRecBlock(d_model=32, d_feedforward=32, n_head=2))
task = mr.MISSRecNextItemTask(temperature=0.07)
model = tr.Model(tr.Head(body, [task], inputs=inputs))
trainer = train(model, "missrec")
after = trainer.evaluate()

# %% [markdown]
# T4R's own metric ranks items of the session too, and our model has a score term for them (its history bias), an XLNet none:
# the two bars are not the same protocol. `missrec compare` ranks both under one ([docs](../docs/howto/compare.md)).

# %%
from missrec_t4r.pages.charts import bars
from missrec_t4r.recommender.evaluation import Chart

metric = "eval_/next-item/ndcg_at_10"
Chart(
    "NDCG@10 as T4R computes it", [bars(["XLNet", "MISSRec"], [before[metric], after[metric]], x_title="", y_title="")]
)

# %% [markdown]
# ## To a run folder
#
# `mr.save_run` tunes the score terms on validation, compares the written model with the trained one, and writes what `missrec train`
# writes: evaluate, export and serve it as any other.

# %%
saved = mr.save_run(model, trainer=trainer, out="run")
{name: round(saved["score_terms"][name], 4) for name in ("valid_ndcg@10_without_terms", "valid_ndcg@10")}

# %%
report = commands.evaluate("run", data="data")
ndcg = {name: round(values["ndcg@10"], 4) for name, values in report["protocols"]["excluded"].items()}
ndcg
