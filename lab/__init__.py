"""The laboratory of sfd_minimal.py: what the method stands on, and what stands on it. A room is a file; arrows go down.

    bench, readme                                    how fast; the tables of the READMEs
    sweep, tour, label_search                        settings of methods; classes and seeds; how long a search takes
    prompt_methods                                   both of the next line, on prompts
    baselines, audit                                 other methods; can it come back?
    methods, stable_diffusion                        their losses; SFD on prompts, with diffusers
    [sfd_minimal.py, train_teacher.py], suspect      at the root; who is searched, and how
    evaluate                                         one verdict: UA, Frechet distance, precision and recall
    fid, prompt_judge                                the literature's FID, optional; the verdict on prompts
    judge, sample                                    classifiers; images out
    run, convert, report                             runs that resume; published pickles; numbers as tables
    cli, checkpoint, labels, label_space             settings; files <-> networks; who is forgotten; between the labels
    device, data, prompts, recipes, edm_pickle, figures, frechet, closed_form, denoisers, [edm_unet.py]   the ground
    errors                                           below it
"""
