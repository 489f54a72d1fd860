# The only entry point. Targets that make files name their inputs; none of them is committed.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh
PROFILE ?= small
include env.mk

# what drawing rests on: a change of the compute code alone does not redraw
PLOTS := $(wildcard kelib/plots*.py) $(addprefix kelib/,claims.py verdicts.py contrasts.py associations.py trends.py \
	intervention_effects.py results.py)
DRAW := $(PLOTS) $(addprefix kelib/,metrics.py tables.py config.py sections.py study.py study_runs.py)
# What runs the stages again is all other code, which costs seconds where no number rests on it: runs are
# done again by the digest of what they rest on (kelib/code_table.py), not by times of files.
COMPUTE := $(filter-out $(PLOTS) $(wildcard kelib/report*.py kelib/readme*.py),$(wildcard kelib/*.py))
PARAMS := notebooks/params/$(PROFILE).yaml
MEASURED := data/measurements/$(PROFILE)
OUT := figures/$(PROFILE)
RUN := $(PY) -m kelib notebook
# whether the profile has a key: some figures need what not every profile asks for
has = $(shell grep -lE '^ *$(1):' '$(PARAMS)' 2>/dev/null)
EARLY = $(shell grep -l 'name: early stages' '$(PARAMS)' 2>/dev/null)
# figures by the stage after which they can be drawn
AFTER_2 := fig02_knowledge_entropy fig03_attention_next_token fig07_data_sets fig08_layers fig09_definitions \
	fig10_entities ours_convergence ours_plasticity_panel $(if $(call has,comparison),fig06_other_family)
AFTER_3 := fig04_stages fig11_once_paraphrase fig12_before_after ours_probe_levels ours_task_forgetting ours_release \
	$(if $(call has,variants),fig13_corpora tab01_protocols ours_confounds) $(if $(EARLY),fig14_whole_pretraining) $(if $(call has,curve_seeds),ours_learning_curves)
AFTER_4 := fig01_overview fig05_resuscitation tab00_claims ours_correlations $(if $(call has,arms),ours_interventions fig15_ratio \
	fig16_resuscitation_stages fig18_attention_temperature)
AFTER_6 := $(if $(call has,mechanism),ours_gradient_shares ours_memory_sources ours_sensitivity) \
	$(if $(call has,retention),ours_retention) $(if $(call has,reactivation),ours_reactivation)
AFTER_7 := $(if $(call has,branches),ours_annealing ours_weight_decay)
AFTER_9 := $(if $(call has,regimes),ours_regimes)
LATE := $(if $(strip $(AFTER_6)),$(OUT)/6_mechanism.ipynb) $(if $(AFTER_7),$(OUT)/7_branches.ipynb) \
	$(if $(AFTER_9),$(OUT)/9_regimes.ipynb)
FIGURES := $(AFTER_2) $(AFTER_3) $(AFTER_4) $(AFTER_6) $(AFTER_7) $(AFTER_9) ours_contrasts
# A notebook writes its results before its last cell has run. One that was killed in between left its
# unfinished copy, and is run again although the results are there: prerequisites of its target.
cut = $(if $(wildcard $(OUT)/.$(1).ipynb.*.ipynb),unfinished)
# a profile may name its figures
NAMED := $(shell sed -n 's/^figures: *\[\(.*\)\].*/\1/p' '$(PARAMS)' 2>/dev/null | tr ',' ' ')
FIGURES := $(or $(strip $(NAMED)),$(FIGURES))
# a profile of a published model has a stage and a figure of its own
ifneq ($(call has,published),)
FIGURES := ours_published
endif
# and so has one that measures checkpoints along pretraining
ifneq ($(call has,trajectory),)
FIGURES := ours_trajectory $(if $(call has,learning),ours_published_stages)
endif
# where a figure stands among those of the profile, said when it is drawn
place = figure $(shell printf '%s\n' $(FIGURES) | grep -nx '$(1)' | cut -d: -f1) of $(words $(FIGURES))

.PHONY: unfinished help figures study test test-stages test-figures torture check format data plan memories audit status notebooks bench reference verify \
	report check-report clean search doctor docs lab
help: ## list the targets
	@echo "make TARGET [PROFILE=smoke|small|...]   (default profile: small)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile env.mk

figures: $(FIGURES:%=$(OUT)/%.json) ## environment, data, study and figures of a profile
	@echo "figures of profile $(PROFILE): $(OUT)"

# The profile is checked before anything is computed or fetched; the stages follow one another.
$(MEASURED)/pretraining.csv: notebooks/stages/1_pretrain.ipynb $(PARAMS) $(COMPUTE) $(call cut,1_pretrain) | $(READY)
	@$(PY) -m kelib profile $(PROFILE)
	@$(RUN) $< $(OUT)/1_pretrain.ipynb -p profile=$(PROFILE) -p scratch=false
$(MEASURED)/checkpoints.csv: notebooks/stages/2_entropy.ipynb $(MEASURED)/pretraining.csv $(call cut,2_entropy)
	@$(RUN) $< $(OUT)/2_entropy.ipynb -p profile=$(PROFILE) -p scratch=false
$(MEASURED)/continual.csv: notebooks/stages/3_continual.ipynb $(MEASURED)/checkpoints.csv $(call cut,3_continual)
	@$(RUN) $< $(OUT)/3_continual.ipynb -p profile=$(PROFILE) -p scratch=false
$(MEASURED)/interventions.csv: notebooks/stages/4_interventions.ipynb $(MEASURED)/continual.csv $(call cut,4_interventions)
	@$(RUN) $< $(OUT)/4_interventions.ipynb -p profile=$(PROFILE) -p scratch=false

# these write many tables: the executed notebook says that all of them are there
$(OUT)/6_mechanism.ipynb: notebooks/stages/6_mechanism.ipynb $(MEASURED)/interventions.csv
	@$(RUN) $< $@ -p profile=$(PROFILE) -p scratch=false
# no two stages at once, so that runs.py alone shares the cores out
$(OUT)/7_branches.ipynb: notebooks/stages/7_branches.ipynb $(MEASURED)/interventions.csv \
		$(filter %/6_mechanism.ipynb,$(LATE))
	@$(RUN) $< $@ -p profile=$(PROFILE) -p scratch=false

# rests on no other stage, but waits for those that a profile has
$(OUT)/9_regimes.ipynb: notebooks/stages/9_regimes.ipynb $(PARAMS) $(COMPUTE) \
		$(if $(NAMED),,$(filter-out %/9_regimes.ipynb,$(LATE))) | $(READY)
	@$(PY) -m kelib profile $(PROFILE)
	@$(RUN) $< $@ -p profile=$(PROFILE) -p scratch=false

$(MEASURED)/texts.csv: notebooks/stages/5_published.ipynb $(PARAMS) $(COMPUTE) $(call cut,5_published) | $(READY)
	@$(PY) -m kelib profile $(PROFILE)
	@$(RUN) $< $(OUT)/5_published.ipynb -p profile=$(PROFILE) -p scratch=false

$(MEASURED)/revisions.csv: notebooks/stages/8_trajectory.ipynb $(PARAMS) $(COMPUTE) $(call cut,8_trajectory) | $(READY)
	@$(PY) -m kelib profile $(PROFILE)
	@$(RUN) $< $(OUT)/8_trajectory.ipynb -p profile=$(PROFILE) -p scratch=false

$(OUT)/ours_published.json: $(MEASURED)/texts.csv
$(OUT)/ours_trajectory.json $(OUT)/ours_published_stages.json: $(MEASURED)/revisions.csv
$(AFTER_2:%=$(OUT)/%.json): $(MEASURED)/checkpoints.csv
$(AFTER_3:%=$(OUT)/%.json): $(MEASURED)/continual.csv
$(AFTER_4:%=$(OUT)/%.json): $(MEASURED)/interventions.csv notebooks/params/claims.yaml
$(AFTER_6:%=$(OUT)/%.json): $(OUT)/6_mechanism.ipynb
$(AFTER_7:%=$(OUT)/%.json): $(OUT)/7_branches.ipynb
$(AFTER_9:%=$(OUT)/%.json): $(OUT)/9_regimes.ipynb
$(OUT)/ours_contrasts.json: $(MEASURED)/interventions.csv notebooks/params/contrasts.yaml $(LATE)
$(foreach figure,$(FIGURES),$(if $(call cut,$(figure)),$(eval $(OUT)/$(figure).json: unfinished)))
$(OUT)/%.json: notebooks/%.ipynb $(DRAW) | $(READY)
	@$(RUN) $< $(OUT)/$*.ipynb -p profile=$(PROFILE) -p source=measurements --note '$(call place,$*)'

$(PARAMS): | $(READY)
	@$(PY) -m kelib profile $(PROFILE)

report: figures ## one page of a profile: claims, charts, every figure (figures/<profile>/report.html)
	@$(PY) -m kelib report $(PROFILE) $(FIGURES)

check-report: report ## open that page in a headless Chromium and look for faults (fetches 50 MB once)
	@$(PY) -m tests.browser $(OUT)/report.html

study: ## five pretraining seeds, needed for verdicts (profile study, two to four hours)
	@$(MAKE) --no-print-directory figures PROFILE=study

data: | $(READY) ## fetch and verify the text of a profile, nothing else
	@$(PY) -m kelib data $(PROFILE)

plan: | $(READY) ## what a profile will cost: runs, downloads, disk, FLOPs, hours, by figure
	@$(PY) -m kelib plan $(PROFILE) $(FIGURES)

memories: | $(READY) ## single layers of SmolLM2 for notebooks/00_start_here (fetches 98 MB)
	@$(PY) -m kelib memories

audit: | $(READY) ## published checkpoints of MODEL: whole, duplicated, changed? (make audit MODEL=olmo-1b)
	@$(PY) -m kelib audit $(MODEL)

status: | $(READY) ## runs of a profile: done, running, failed, missing
	@$(PY) -m kelib status $(PROFILE)

# Files are shared out over processes, but for the notebooks of stages, which continue one another
# and so are checked in turn, beside those of figures.
TEST_PROCESSES ?= 2
NBVAL := -m pytest -q --nbval -p no:cacheprovider
test: | $(READY) ## all tests, notebooks included (nbval), offline
	@$(PY) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-stages test-figures
test-stages: | $(READY)
	@$(PY) $(NBVAL) notebooks/stages
test-figures: | $(READY)
	@$(PY) $(NBVAL) notebooks/*.ipynb

check: | $(READY) ## format, lint, types
	@$(PY) -m ruff format --check kelib tests notebooks
	@$(PY) -m ruff check kelib tests notebooks
	@$(PY) -m mypy kelib

format: | $(READY) ## rewrite the code in the project's format
	@$(PY) -m ruff format kelib tests notebooks
	@$(PY) -m ruff check --fix kelib tests notebooks

search: | $(READY) ## the search that chose the small model's regime (90 minutes; resumable)
	@$(RUN) notebooks/stages/0_search.ipynb figures/search/0_search.ipynb -p scratch=false
	@$(RUN) notebooks/ours_search.ipynb figures/search/ours_search.ipynb -p source=measurements

docs: | $(READY) ## the API reference from the docstrings, into docs/api (no network)
	@$(PY) -m kelib docs docs/api

notebooks: | $(READY) ## run all committed notebooks again, in place
	@$(PY) -m kelib execute

# FAULT is kills, same, resources, ... (python -m tests.torture --help); OPTIONS such as --short
FAULT ?= all
COUNT ?= 20
torture: | $(READY) ## faults on purpose, survived or not (hours; FAULT=kills COUNT=200)
	@$(PY) -m tests.torture $(FAULT) --count $(COUNT) $(OPTIONS)

bench: | $(READY) ## time and memory against the floor and against other libraries, as ratios
	@$(PY) -m tests.benchmarks

reference: figures ## promote a finished profile to data/reference and figures/reference
	@$(PY) -m kelib reference $(PROFILE)

verify: | $(READY) ## fresh measurements beside the reference, quantity by quantity; fails on a real difference
	@$(PY) -m kelib verify $(PROFILE) $(VERIFY)

doctor: ## what is missing on this machine, and how to mend it
	@$(if $(shell test -x '$(PY)' && echo yes),$(PY),$(PYTHON)) -m kelib doctor $(if $(READY),--environment '$(VENV)')

lab: | $(READY) ## open the notebooks in JupyterLab
	@$(PY) -m jupyter lab --notebook-dir=notebooks

clean: | $(READY) ## delete what a profile computed (not the text, not the reference)
	@$(PY) -m kelib clean $(PROFILE)
