"""Numbers that the public code of newer methods gave for small inputs: oracles for ours.

Inputs are short binary fractions, exact in fp32. Outputs are the shortest decimals that name the fp32 value.
Each block cites repository, commit, file and lines of the code that was run.
Names are ours: sigma 1 is noise, velocity is noise - data, log_prob is a mean over elements.
"""

# --- two samples of four elements, for the losses that noise the data again ---------------------------------

DATA = [[.5, -1.25, .75, .25], [-.5, 1., -.75, 1.5]]
NOISE = [[1., .25, -.75, -1.5], [.75, -.25, 1.25, -.5]]
VELOCITY = [[.625, 1.25, -1.75, -1.5], [1.5, -1., 2.25, -2.25]]
VELOCITY_OLD = [[.5, 1.5, -1.25, -2.], [1., -1.25, 1.75, -2.]]
VELOCITY_REF = [[.25, 1., -1., -1.75], [.75, -1.5, 2., -1.5]]
SIGMA = [.75, .25]
ADVANTAGES = [1.5, -6.5]

# --- Advantage weighted matching (2509.25050) ---------------------------------------------------------------

# scxue/advantage_weighted_matching@be513723 advantage_weighted_matching/scripts/train_sd3_awm.py:210-252.
# X-GenGroup/Flow-Factory@a0b2bc5a src/flow_factory/trainers/awm.py:284-330 gave the same to fp32.
AWM_LOG_PROB = { # weighting -> log_prob of VELOCITY
    'Uniform': [-.05078125, -.0625],
    't': [-.038085938, -.015625],
    't**2': [-.028564453, -.00390625],
    'huber': [-.16900271, -.0624975],
    'ghuber': [-1.4146348, -.49683774], # power 0.25, the published one
}
AWM_LOG_PROB_OLD = [-1.2518578, -.41728592] # ghuber, of VELOCITY_OLD

# The same file:1293-1354, ghuber, loss_type 'exp_first'; gradients are with respect to VELOCITY.
AWM_ADVANTAGES = [.3, -1.] # clipped to 5 and divided by 5
AWM_RATIO = [.8497806, .92353016]
AWM_LOSS = .33429798 # clip_range 1, the published one
AWM_GRAD = [[.055854972, -.111709945, -.111709945, .111709945],
            [-.11544127, -.11544127, -.11544127, .11544127]]
AWM_LOSS_NARROW = .3675329 # clip_range 0.01; Flow-Factory awm.py:497-502 gave the same
AWM_GRAD_NARROW = [[.055854972, -.111709945, -.111709945, .111709945], [0., 0., 0., 0.]]
AWM_KL_REF = .28320312 # mean (velocity - VELOCITY_REF)^2
AWM_KL_OLD = .15039062 # mean (velocity - VELOCITY_OLD)^2
AWM_LOSS_KL = .48497182 # AWM_LOSS + 0.001 AWM_KL_REF + 1 AWM_KL_OLD
AWM_LOSS_UNIFORM = 1.6875894 # 'Uniform', clip_range 1, advantages clipped to 5, not divided
AWM_GRAD_UNIFORM = [[.045968354, -.09193671, -.09193671, .09193671],
                    [-.30288538, -.30288538, -.30288538, .30288538]]

# The same file:1198-1200 and 1173-1175: bounds of the six strata of step indices, of a schedule of 14 steps.
AWM_STRATA = [1, 2, 4, 6, 8, 10, 12] # 'discrete_wo_init': one index from each [b[i], b[i + 1])
AWM_STRATA_WITH_FIRST = [0, 2, 4, 6, 8, 10, 12] # 'discrete'

# --- DiffusionNFT (2509.16117) ------------------------------------------------------------------------------

# NVlabs/DiffusionNFT@24af5554 scripts/train_nft_sd3.py:910-929: r of advantages clipped to 5.
NFT_ADVANTAGES = [-7., -5., -2.5, -1., 0., 1.25, 5., 9.]
NFT_R = [0., 0., .25, .4, .5, .625, 1., 1.]

# The same file:908-970, of the two samples above with ADVANTAGES, for beta 1 and 0.1. r is [0.65, 0].
# X-GenGroup/Flow-Factory@a0b2bc5a src/flow_factory/trainers/nft.py:400-431 gave the same losses to fp32.
NFT_BETA = [1., .1]
NFT_POSITIVE = [[.17410715, .0625], [.13848214, .04513892]] # one row per beta
NFT_NEGATIVE = [[.48125, .15625], [.21268374, .069711514]]
NFT_WEIGHT = [[.1640625, .0625], [.082031265, .028124988]] # of the positive side
NFT_LOSS = [1.0946429, 5.8541055]
NFT_LOSS_KL = [1.0946712, 5.8541336] # with 0.0001 mean (velocity - VELOCITY_REF)^2
NFT_GRAD = [ # with respect to VELOCITY, without KL, one row per beta
    [[.43571427, -.87142855, -1.2214286, 1.2214286], [.46875, .15625, .46875, -.15625]],
    [[.09537791, -.190757, .49663872, -.49663842], [.5769229, .048077103, .5769229, -.048077103]],
]

# The same file:169-189: share of itself that the old policy keeps after optimiser step n.
NFT_DECAY_STEPS = [[0, 1, 100, 499, 500, 1000], [0, 74, 75, 100, 208, 300]]
NFT_DECAY = [[0., .001, .1, .499, .5, .5], [0., 0., 0., .1875, .9975, .999]] # decay_type 1, decay_type 2

# --- a schedule of seven steps ------------------------------------------------------------------------------

SIGMAS = [1., .9375, .84375, .75, .625, .4375, .25, 0.]

# --- Flow-DPPO (2606.11025) ---------------------------------------------------------------------------------

# Tencent-Hunyuan/UniRL@1a7b501e unirl/algorithms/flowdppo.py:342-368: std of four steps of SIGMAS, eta 0.7.
# Step 0 is not the flow kernel's: sigma 1 is capped at 0.99, not at SIGMAS[1].
DPPO_STD_STEPS = [0, 1, 3, 5]
DPPO_STD = [1.7500008, .8300979, .42866066, .2673169]

# The same file:43-51, reduced as in :92-93.
DPPO_MEAN = [[.5, -.25, .125, 1.], [0., .25, -.5, .75]]
DPPO_MEAN_OLD = [[.375, -.25, .25, .75], [.25, .25, -.5, .5]]
DPPO_MEAN_STD = [.5, .25]
DPPO_MEAN_KL = [.046875, .25]

# The same file:54-138: eight transitions of one element each, std 0.5, threshold 1e-5, old means 0.
DPPO_LOG_RATIO = [.25, .25, -.25, -.25, .25, -.25, .25, 0.]
DPPO_ADVANTAGES = [1., 1., -1., -1., -1., 1., -2., 2.]
DPPO_MEANS = [.001953125, .0078125, .0078125, .001953125, .0078125, .0078125, .00390625, .0078125]
DPPO_KL = [7.6293945e-06, .00012207031, .00012207031,
           7.6293945e-06, .00012207031, .00012207031, 3.0517578e-05, .00012207031]
DPPO_KEEP = [True, False, False, True, True, True, True, True]
DPPO_LOSSES = [-1.2840254, 0., 0., .7788008, 1.2840254, -.7788008, 2.5680509, -2.]
DPPO_LOSS = .07100636 # mean over all eight
DPPO_GRAD = [-.16050318, 0., 0., .0973501, .16050318, -.0973501, .32100636, -.25] # to log_prob

# --- Flash-GRPO (2605.15980) --------------------------------------------------------------------------------

# Shredded-Pork/Flash-GRPO@42110137 flow_grpo/diffusers_patch/wan2_1_pipeline_with_logprob2.py:10-82,
# steps 0 to 6 of SIGMAS.
FLASH_STD = [.234375, .26910898, .2421981, .24859223, .25371838, .17760286, .1171875] # of the step's noise
FLASH_WEIGHT = [3.7499998, 2.798438, 2.441969, 1.8373454, 1.2268075, .8547743, .4330664] # before any mean

# The same function at steps 1 and 4, latents DATA, velocity VELOCITY, sample FLASH_SAMPLE.
FLASH_STEPS = [1, 4]
FLASH_SAMPLE = [[.25, -.75, .5, 0.], [-.25, .75, -.5, 1.25]]
FLASH_MEAN = [[.4205856, -1.3219252, .8893191, .38459003], [-.78446865, 1.1553135, -1.176703, 1.8880792]]
FLASH_LOG_PROB = [-.73803115, -2.1009]

# The same repository, scripts/train_wanx2_1_flash.py:984: three of its ten weights, to four decimals.
# The schedule they belong to, at steps 0, 1, 5, 6, 9, 10 of 20: shift 3, from linspace(1, 1/1000, 21).
FLASH_WAN_STEPS = [0, 5, 9]
FLASH_WAN_WEIGHT = [7.477, 5.3559, 3.7754]
FLASH_WAN_SIGMAS = [.99966645, .9824195, .8996398, .8746352, .78533995, .7496248]

# The same file:976-997 for steps 0, 5, 9, 0 of that schedule, clip_range 0.001; weights over their mean.
FLASH_LOSS_LOG_RATIO = [0., .0009765625, .001953125, -.001953125]
FLASH_LOSS_ADVANTAGES = [1., -.5, 6., -2.] # 6 is clipped to 5
FLASH_LOSS_WEIGHT = [1.2417533, .8894886, .62700486, 1.2417533]
FLASH_LOSS = -.3634277
FLASH_LOSS_GRAD = [-.31043833, .1112947, 0., 0.] # to log_prob

# --- DGPO (2510.08425) --------------------------------------------------------------------------------------

# Luo-Yihong/DGPO@01ceb4b8 scripts/train_sd3_dgpo.py:162-193 and 1127-1149: two groups of two, beta_dpo 10.
# X-GenGroup/Flow-Factory@a0b2bc5a src/flow_factory/trainers/dgpo.py:448-528 gave the same loss.
DGPO_TARGET = [[.5, 1.5], [-1.5, -1.75], [1.25, -1.25], [2., -2.]] # noise - data
DGPO_VELOCITY = [[.5, 1.4375], [-1.75, -1.5], [1.5, -1.], [2.25, -2.25]]
DGPO_VELOCITY_OLD = [[.75, 1.5], [-1.25, -2.], [1., -1.25], [1.75, -2.]]
DGPO_VELOCITY_REF = [[.25, 1.], [-1., -1.75], [.75, -1.5], [2., -1.5]]
DGPO_ADVANTAGES = [1., -1., 1.5, -1.5]
DGPO_GROUPS = [0, 0, 1, 1]
DGPO_SUMS = [-.45898438, -.234375] # one per group
DGPO_WEIGHTS = [.38722676, .38722676, .441673, .441673]
DGPO_RATIO = [1.0297302, 1., .9692332, .9692332] # exp(old dsm - dsm)
DGPO_LOSS = -.0058613424 # the same for both clips
DGPO_CLIP_RANGE = [.05, .01]
DGPO_CLIPPED = [[False, False, False, False], [True, False, False, True]]
DGPO_GRAD = [ # with respect to DGPO_VELOCITY, one row per clip range
    [[0., -.006050418], [.024201673, -.024201673], [.041406844, .041406844], [-.041406844, .041406844]],
    [[0., 0.], [.024201673, -.024201673], [.041406844, .041406844], [0., 0.]],
]

# --- advantages ---------------------------------------------------------------------------------------------

# X-GenGroup/Flow-Factory@a0b2bc5a src/flow_factory/advantage/advantage_processor.py:403-481 (GDPO),
# :314-397 (sum), with :242-263; weights 1 and 0.5, two groups of four.
REWARD_ONE = [.125, .5, .25, .875, .5, .5, .75, 1.]
REWARD_TWO = [3., 1., 2., 2., 5., 4., 4., 1.]
REWARD_WEIGHTS = [1., .5]
REWARD_GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
GDPO_ADVANTAGES = [-.5102661, -.6496738, -.869955, 2.029895,
                   -.53757644, -.9805358, .62215155, .89596075]
SUM_ADVANTAGES_GLOBAL = [.2738613, -.63900965, -.2738613, .63900965, # std of the batch
                         .8215838, .09128709, .45643547, -1.3693064]
SUM_ADVANTAGES_GROUP = [.557086, -1.2998674, -.557086, 1.2998674, # std of the group
                        .9878783, .10976426, .5488213, -1.6464639]

# PerPromptStatTracker.update of the weighted sum: 0.0001 is added to the std, which is over all n.
# Alike in NVlabs/DiffusionNFT@24af5554, scxue/advantage_weighted_matching@be513723, Luo-Yihong/DGPO@01ceb4b8,
# Shredded-Pork/Flash-GRPO@42110137 and YunzeTong/TurningPoint-GRPO@994d26a6, flow_grpo/stat_tracking.py.
TRACKER_ADVANTAGES_GLOBAL = [.2738213, -.6389163, -.2738213, .6389163,
                             .8214639, .09127376, .4563688, -1.3691064]
TRACKER_ADVANTAGES_GROUP = [.5569205, -1.2994813, -.5569205, 1.2994813,
                            .9877049, .10974499, .54872495, -1.6461748]

# --- TurningPoint-GRPO (2602.06422) -------------------------------------------------------------------------

# YunzeTong/TurningPoint-GRPO@994d26a6 scripts/my_train_flux_fast_with_op3.py:851-1101,
# with the flags of scripts/single_node/common_op3.sh. One row per chain of four stochastic steps:
# the reward of the ODE from the start, after 1, 2, 3 steps, and of the chain's own end.
TURNING_REWARDS = [
    [.5, .25, .75, .5, .875],
    [.5, .75, .625, .25, .375],
    [.25, .5, .375, .875, .75],
    [.625, .375, .25, .5, .125],
    [.5, .625, .5, .375, .75],
    [.75, .5, .625, .375, .5],
]
# Before balancing.
TURNING_POINTS = [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
TURNING_VALUES = [ # per step
    [-.25, .625, -.25, .375],
    [.25, -.375, -.375, .125],
    [.5, -.125, .5, -.125],
    [-.5, -.125, .25, -.375],
    [.25, -.125, -.125, .375],
    [-.25, .125, -.25, .125],
]
TURNING_POINTS_BALANCED = [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
TURNING_VALUES_BALANCED = [ # chain 4 gains least of three, and only two chains lose
    [-.25, .625, -.25, .375],
    [.25, -.375, -.375, .125],
    [.5, -.125, .5, -.125],
    [-.5, -.125, .25, -.375],
    [.125, -.125, -.125, .375],
    [-.25, .125, -.25, .125],
]
